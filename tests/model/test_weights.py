"""Weights are the same in every layout, drawn at random or loaded from a sharded checkpoint."""

import eagle_cases as cases
import pytest
import torch
from eagle_cases import EAGLE, EagleConfig, QwenConfig
from megatron.core import dist_checkpointing, parallel_state

from megatron_eagle.compat.checkpoint_saving import collect_results_here
from megatron_eagle.config.layout import Layout
from megatron_eagle.errors import UserError
from megatron_eagle.model import hf_names
from megatron_eagle.model.weights import weight_slices

TIED = EagleConfig(64, EAGLE.encoders, QwenConfig(**{**vars(EAGLE.language), "tie_word_embeddings": True}))
LAYOUTS = [Layout(tp=2), Layout(pp=2), Layout(pp=2, vpp=2), Layout(tp=2, pp=2)]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["tp", "pp", "virtual", "tp-pp"])


def whole_weights(config, seed):
    cases.start(Layout())
    (model,) = cases.build(config, Layout(), seed=seed)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def differing(models, expected):
    """Names of parameters that are not, bit for bit, this process's slice of ``expected``; and all names."""
    slices = [weight for model in models for weight in weight_slices(model, model.tp_group)]
    wrong = [weight.name for weight in slices if not torch.equal(weight.parameter, weight.cut(expected[weight.name]))]
    return wrong, {weight.name for weight in slices}


def draw(config, layout, seed, expected):
    cases.start(layout)
    return differing(cases.build(config, layout, seed=seed), expected)


def state_of(models):
    metadata = {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return {f"model{number}": model.sharded_state_dict(metadata=metadata) for number, model in enumerate(models)}


def save(config, layout, seed, folder):
    cases.start(layout)
    collect_results_here()
    dist_checkpointing.save(state_of(cases.build(config, layout, seed=seed)), folder)


def load(config, layout, seed, folder, expected):
    cases.start(layout)
    models = cases.build(config, layout, seed=seed)
    before, _ = differing(models, expected)
    state = dist_checkpointing.load(state_of(models), folder)
    for number, model in enumerate(models):
        model.load_state_dict(state[f"model{number}"])
    return before, *differing(models, expected)


@each_layout
def test_random_weights_do_not_depend_on_the_layout(worlds, layout):
    (expected,) = worlds(1).run(whole_weights, TIED, 7)
    results = worlds(layout.model_parallel_size).run(draw, TIED, layout, 7, expected)
    assert [different for different, _ in results] == [[]] * len(results)
    assert set.union(*(names for _, names in results)) == set(expected)


def test_random_weights_depend_on_the_seed(worlds):
    (one,), (other,) = worlds(1).run(whole_weights, EAGLE, 1), worlds(1).run(whole_weights, EAGLE, 2)
    assert all(not torch.equal(one[name], other[name]) for name in one if one[name].ndim > 1)


def test_initial_spread(worlds):
    (weights,) = worlds(1).run(whole_weights, EAGLE, 1)
    qkv = weights["vision.siglip.transformer.layers.0.self_attention.linear_qkv.weight"]
    assert float(qkv.std()) == pytest.approx(48**-0.5, rel=0.1)
    assert float(weights["language.decoder.layers.1.mlp.linear_fc1.weight"].std()) == pytest.approx(0.1, rel=0.1)
    assert weights["language.decoder.layers.0.self_attention.linear_qkv.bias"].abs().max() == 0
    assert weights["vision.convnext.stages.0.0.layer_scale"].eq(0.5).all()


@each_layout
def test_checkpoint_of_one_layout_loads_in_another(worlds, layout, tmp_path):
    (expected,) = worlds(1).run(whole_weights, TIED, 7)
    worlds(layout.model_parallel_size).run(save, TIED, layout, 7, str(tmp_path))
    ((before, after, names),) = worlds(1).run(load, TIED, Layout(), 8, str(tmp_path), expected)
    assert len(before) > 0
    assert after == []
    assert names == set(expected)


def test_checkpoint_of_one_process_loads_in_two(worlds, tmp_path):
    (expected,) = worlds(1).run(whole_weights, TIED, 7)
    worlds(1).run(save, TIED, Layout(), 7, str(tmp_path))
    for before, after, _ in worlds(2).run(load, TIED, Layout(tp=2), 8, str(tmp_path), expected):
        assert before
        assert after == []


def load_incomplete(change):
    cases.start(Layout())
    (model,) = cases.build(EAGLE, Layout())
    state = {name: torch.zeros(48, 48) for name in ("1.weight", "3.weight")}
    state |= {name: torch.zeros(48) for name in ("1.bias", "3.bias")}
    state |= {name: torch.zeros(232) for name in ("0.weight", "0.bias")}
    state["1.weight"] = torch.zeros(48, 232)
    change = dict(change)
    for name in change.pop("without", ()):
        del state[name]
    state |= change
    try:
        hf_names.load(model, hf_names.connector_sources(prefix=""), state, model.tp_group)
    except UserError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "loaded"),
        ({"without": ("3.bias",)}, "connector.linear_fc2.bias needs 3.bias, which the checkpoint does not have"),
        ({"3.weight": torch.zeros(48, 47)}, "3.weight: connector.linear_fc2.weight needs shape [48, 48], got [48, 47]"),
    ],
    ids=["complete", "missing", "shape"],
)
def test_hugging_face_weights_that_do_not_fit(worlds, change, message):
    assert worlds(1).run(load_incomplete, change) == [message]
