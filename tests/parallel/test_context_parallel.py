"""Context parallelism changes neither losses nor gradients, however the cut of a pack falls among its segments."""

from dataclasses import replace
from typing import Any

import eagle_cases as cases
import pytest
import torch
from eagle_cases import EAGLE, pack

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig, check_layout
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.parallel import context

FOUR_GROUPS = EagleConfig(
    EAGLE.tile_size, EAGLE.encoders, cases.QwenConfig(**{**vars(EAGLE.language), "num_key_value_heads": 4})
)
TIED = EagleConfig(
    EAGLE.tile_size, EAGLE.encoders, cases.QwenConfig(**{**vars(EAGLE.language), "tie_word_embeddings": True})
)


def without_padding(batch: PackedBatch) -> PackedBatch:
    """The pack without its empty last segment."""
    return replace(batch, cu_seqlens=batch.cu_seqlens[:-1], borders=batch.borders[:-1], useful_tokens=batch.length)


# With one round of zigzag, chunks are 32 positions in two places and 16 in four; ROUNDS makes them 8. Tiles take 16
# positions each, across the cuts too.
ROUNDS = {"shortest_chunk": 8}
PACKS = {
    "several segments and padding": pack(seed=1),
    "one segment": without_padding(pack(tile_slots=(9, 56), borders=(0, 128, 128), seed=2)),
    "no tiles": pack(tile_slots=(), borders=(0, 5, 6, 50, 128), seed=3),
    "mostly padding": pack(tile_slots=(1,), borders=(0, 20, 128), seed=4),
}
BATCHES = list(PACKS.values())
_references: dict[int, tuple[list[float], dict[str, torch.Tensor]]] = {}


def reference(worlds: Any, config: EagleConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    if id(config) not in _references:
        ((losses, gradients),) = worlds(1).run(cases.losses_and_gradients, config, Layout(), BATCHES)
        assert all(gradient.norm() > 0 for gradient in gradients.values())
        _references[id(config)] = losses, gradients
    return _references[id(config)]


def difference(
    config: EagleConfig, layout: Layout, expected: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[list[float], dict[str, float]]:
    """This process's share of the losses (none if another holds a copy), and by how much each of its gradients differs
    from the full ones ``expected``, relative to their norm."""
    context.SHORTEST_CHUNK = options.pop("shortest_chunk", 256)
    losses, gradients = cases.losses_and_gradients(config, layout, BATCHES, **options)
    apart = {}
    for model in cases.build(config, layout, seed=None, **options):
        for weight in cases.weight_slices(model, model.tp_group):
            whole = expected[weight.name]
            apart[weight.name] = float((gradients[weight.name] - weight.cut(whole)).norm() / whole.norm())
    copy = cases.parallel_state.get_tensor_model_parallel_rank() > 0
    return ([] if copy else losses), apart


@pytest.mark.parametrize(
    ("layout", "config", "options"),
    [
        (Layout(cp=2), EAGLE, {}),
        (Layout(cp=2, ulysses=2), EAGLE, {}),
        (Layout(cp=2), EAGLE, ROUNDS),
        (Layout(cp=2), EAGLE, ROUNDS | {"recompute": "full"}),
        (Layout(cp=2), EAGLE, {"recompute": "offload"}),
        (Layout(cp=2, ulysses=2), EAGLE, {"recompute": "selective"}),
        (Layout(cp=4), EAGLE, {}),
        (Layout(cp=4), EAGLE, ROUNDS),
        (Layout(cp=4, ulysses=2), EAGLE, {}),
        (Layout(cp=4, ulysses=2), EAGLE, ROUNDS),
        (Layout(cp=4, ulysses=4), FOUR_GROUPS, {}),
        (Layout(tp=2, cp=2), EAGLE, {}),
        (Layout(tp=2, cp=2, sequence_parallel=True), EAGLE, {}),
        (Layout(tp=2, cp=2, ulysses=2, sequence_parallel=True), FOUR_GROUPS, {}),
        (Layout(pp=2, cp=2), TIED, ROUNDS),
        (Layout(pp=2, vpp=2, cp=2, ulysses=2), EAGLE, {}),
    ],
    ids=lambda value: _name(value),
)
def test_layout_changes_nothing(worlds, layout, config, options):
    losses, gradients = reference(worlds, config)
    results = worlds(layout.model_parallel_size).run(difference, config, layout, gradients, options)
    shares = torch.tensor([share for share, _ in results if share], dtype=torch.float64)
    assert len(shares) == layout.cp, "every process of the last stage has a share of the loss"
    assert shares.sum(0).tolist() == pytest.approx(losses, rel=1e-6)
    seen = {}
    for _, apart in results:
        for name, relative in apart.items():
            seen[name] = max(relative, seen.get(name, 0.0))
    assert set(seen) == set(gradients)
    worst = max(seen, key=seen.__getitem__)
    assert seen[worst] < 1e-5, worst


def _name(value: Any) -> str | None:
    if isinstance(value, Layout):
        sizes = {axis: getattr(value, axis) for axis in ("tp", "pp", "vpp", "cp", "ulysses")}
        return (
            "-".join(f"{axis}{size}" for axis, size in sizes.items() if (size or 1) > 1)
            + "-sp" * value.sequence_parallel
        )
    return "-".join(str(option) for option in value.values()) if isinstance(value, dict) else ""


def loss_and_logits(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    cases.start(layout)
    (model,) = cases.build(EAGLE, layout)
    with torch.no_grad():
        return model(BATCHES[0]), model(BATCHES[0], compute_loss=False)


@pytest.mark.parametrize("layout", [Layout(cp=4), Layout(cp=4, ulysses=2)], ids=_name)
def test_losses_are_scattered_and_logits_gathered(worlds, layout):
    """Each position's loss is part of one process's share; the logits are whole on every process."""
    ((loss, logits),) = worlds(1).run(loss_and_logits, Layout())
    results = worlds(4).run(loss_and_logits, layout)
    torch.testing.assert_close(sum(theirs.double() for theirs, _ in results), loss.double(), rtol=1e-6, atol=0.0)
    for _, theirs in results:
        torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(cp=8, ulysses=8), "ulysses=8 does not divide 2 key/value heads of tp=1"),
        (Layout(tp=2, cp=2, ulysses=2), "ulysses=2 does not divide 1 key/value heads of tp=2"),
        (Layout(tp=4, cp=2, ulysses=2), "ulysses=2 does not divide 1 key/value heads of tp=4"),
    ],
)
def test_ulysses_is_limited_by_key_value_heads(layout, message):
    with pytest.raises(ValueError, match=message):
        check_layout(EAGLE, layout)


def test_ulysses_is_a_factor_of_cp():
    with pytest.raises(ValueError, match="ulysses=3 does not divide cp=4"):
        Layout(cp=4, ulysses=3)


@pytest.mark.parametrize(
    ("layout", "length", "message"),
    [
        (Layout(cp=2), 130, r"a pack of 130 tokens cannot be cut into 4 chunks \(cp=2\) x ulysses=1 = 4 equal parts"),
        (Layout(cp=4, ulysses=2), 132, r"132 .* 4 chunks \(cp=4\) x ulysses=2 = 8 equal parts"),
        (Layout(tp=2, sequence_parallel=True), 129, r"129 .* ulysses=1 x tp=2 \(sequence_parallel\) = 2 equal parts"),
        (Layout(tp=2, cp=2, sequence_parallel=True), 132, r"132 .* = 8 equal parts"),
    ],
)
def test_lengths_that_cannot_be_cut_are_refused(layout, length, message):
    with pytest.raises(ValueError, match=message):
        layout.check_pack_length(length)
    layout.check_pack_length(128)
