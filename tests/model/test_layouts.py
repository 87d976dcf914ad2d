"""Every layout computes the same losses and the same gradients as one process."""

import eagle_cases as cases
import pytest
import torch
from eagle_cases import EAGLE, losses_and_gradients, pack, worst_gradient_difference

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig, check_layout

BATCHES = [
    pack(seed=1),
    pack(tile_slots=(30,), borders=(0, 60, 90, 128), seed=2),
    pack(tile_slots=(), seed=3),
    pack(seed=4),
]
TIED = EagleConfig(
    EAGLE.tile_size, EAGLE.encoders, cases.QwenConfig(**{**vars(EAGLE.language), "tie_word_embeddings": True})
)
ONE_GROUP = EagleConfig(
    EAGLE.tile_size, EAGLE.encoders, cases.QwenConfig(**{**vars(EAGLE.language), "num_key_value_heads": 1})
)
_references: dict[int, tuple[list[float], dict[str, torch.Tensor]]] = {}


def reference(worlds, config):
    if id(config) not in _references:
        ((losses, gradients),) = worlds(1).run(losses_and_gradients, config, Layout(), BATCHES)
        assert len(losses) == len(BATCHES) and all(torch.isfinite(torch.tensor(losses)))
        assert all(gradient.abs().max() > 0 for gradient in gradients.values()), "a parameter without any gradient"
        _references[id(config)] = losses, gradients
    return _references[id(config)]


@pytest.mark.parametrize(
    ("processes", "layout", "config"),
    [
        (2, Layout(tp=2), EAGLE),
        (2, Layout(tp=2, sequence_parallel=True), EAGLE),
        (2, Layout(tp=2, sequence_parallel=True), ONE_GROUP),
        (2, Layout(pp=2), EAGLE),
        (2, Layout(pp=2), TIED),
        (2, Layout(pp=2, layers_per_stage=(1, 3)), EAGLE),
        (2, Layout(pp=2, vpp=2), EAGLE),
        (4, Layout(tp=2, pp=2, sequence_parallel=True), TIED),
    ],
    ids=["tp", "sequence", "fewer-groups-than-tp", "pp", "pp-tied", "uneven", "virtual", "tp-pp-sequence-tied"],
)
def test_layout_changes_nothing(worlds, processes, layout, config):
    losses, gradients = reference(worlds, config)
    results = worlds(processes).run(worst_gradient_difference, config, layout, BATCHES, gradients)
    names_seen = 0
    for their_losses, worst, compared in results:
        assert their_losses in ([], pytest.approx(losses, abs=1e-4, rel=1e-5))
        assert worst < 2e-5
        names_seen += compared
    assert results[-1][0], "the last stage must report losses"
    assert names_seen >= len(gradients)


@pytest.mark.parametrize(
    "options", [{"recompute": "selective"}, {"recompute": "full"}, {"recompute": "full", "recompute_layers": 1}]
)
def test_recomputing_changes_nothing(worlds, options):
    losses, gradients = reference(worlds, EAGLE)
    ((again, new),) = worlds(1).run(_with_options, EAGLE, Layout(), BATCHES, options)
    assert again == losses
    assert all(torch.equal(new[name], gradients[name]) for name in gradients)


def test_bf16_is_close(worlds):
    losses, _ = reference(worlds, EAGLE)
    ((again, gradients),) = worlds(1).run(_with_options, EAGLE, Layout(), BATCHES, {"precision": "bf16"})
    assert again == pytest.approx(losses, rel=0.02)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_pack_without_tiles_gives_zero_gradients_to_the_encoders(worlds):
    """With overlapped reduction, which from the second step on waits for every parameter to report its gradient."""
    options = {"overlap": True, "warm_up": [pack()]}
    for losses, gradients in worlds(2).run(_with_options, EAGLE, Layout(), [pack(tile_slots=())], options):
        for name, gradient in gradients.items():
            assert bool(gradient.any()) == name.startswith("language."), name
        assert losses[0] > 0


def test_frozen_vision_gets_no_gradient_and_changes_no_other(worlds):
    _, gradients = reference(worlds, EAGLE)
    ((_, only),) = worlds(1).run(_with_options, EAGLE, Layout(), BATCHES, {"frozen": ("vision", "language")})
    assert {name.split(".")[0] for name in only} == {"connector"}
    for name, gradient in only.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-5)


def _with_options(config, layout, batches, options):
    return losses_and_gradients(config, layout, batches, **options)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp=3), "tp=3 does not divide 4 attention heads"),
        (Layout(pp=3), "pp=3 x vpp=1 does not divide 4 layers"),
        (Layout(pp=2, layers_per_stage=(1, 2)), "adds up to 3 layers, the language model has 4"),
        (Layout(tp=8), "tp=8 does not divide 4 attention heads"),
        (Layout(pp=4, vpp=2), "needs at least 8 layers"),
    ],
)
def test_impossible_layouts_are_refused_with_the_numbers(layout, message):
    with pytest.raises(ValueError, match=message):
        check_layout(EAGLE, layout)


def test_key_value_heads_and_tp_must_fit_each_other():
    language = cases.QwenConfig(**{**vars(EAGLE.language), "num_attention_heads": 12, "num_key_value_heads": 4})
    with pytest.raises(ValueError, match="tp=6 and 4 key/value heads"):
        check_layout(EagleConfig(64, EAGLE.encoders, language), Layout(tp=6))
