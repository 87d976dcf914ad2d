"""The whole model with ``transformer_impl: transformer_engine``, built on a CPU over a stub of the compiled module.

It has the weights of the local implementation under the same names, and checkpoints go from each to the other. What it
computes cannot be seen here. Needs the package ``transformer_engine``, the part that every platform has (``make
test-te`` puts it and what it imports into a folder).
"""

import json
import zlib
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import checkpoint_cases
import pytest
import stub
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, apply_factories
from small_run import ENCODERS, LANGUAGE, SmallRun
from torch import Tensor

from megatron_eagle.checkpoint import sharded_state
from megatron_eagle.checkpoint.files import Description, load_training_state, load_weights
from megatron_eagle.checkpoint.safe_index import read_index
from megatron_eagle.checkpoint.saver import Saver
from megatron_eagle.compat.platform import install
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.conversion.convert import Options, hf_to_megatron
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.model.weights import weight_slices
from megatron_eagle.parallel.groups import Groups, initialise
from megatron_eagle.training.engine import Engine, build_engine

LOCAL, TE = "local", "transformer_engine"
MODELS = {
    "mixture": {"preset": "tiny", "encoders": ENCODERS, "language": LANGUAGE},
    "tied": {"preset": "tiny", "encoders": ENCODERS, "language": {**LANGUAGE, "tie_word_embeddings": True}},
    "dinov2": {"preset": "tiny", "encoders": [{**ENCODERS[0], "kind": "dinov2"}], "language": LANGUAGE},
}
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {  # processes, model, layout
    "one": (1, "mixture", {}),
    "dinov2": (1, "dinov2", {}),
    "tp": (2, "mixture", {"tp": 2, "sequence_parallel": True}),
    "pp": (2, "tied", {"pp": 2}),
    "spread": (2, "mixture", {"encoder": "spread"}),
}
each_case = pytest.mark.parametrize("case", CASES)
each_way = pytest.mark.parametrize(("source", "target"), [(LOCAL, TE), (TE, LOCAL)], ids=["from local", "from te"])
pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(case: str, tmp_path: Path) -> str:
    _, model, layout = CASES[case]
    return str(SmallRun(tmp_path).write_recipe(tmp_path / "recipe.yaml", model=MODELS[model], layout=layout))


def start(recipe: str) -> Groups:
    return initialise(load_recipe(Path(recipe)).layout, install(), timeout=timedelta(minutes=1))


def build(recipe: str, implementation: str, seed: int, groups: Groups, stage: str = "second") -> Engine:
    """What trains ``stage`` on this process; every weight and moment is drawn from ``seed`` and its name."""
    settings = load_recipe(Path(recipe), (f"model.transformer_impl={implementation}", f"seed={seed}"))
    platform = install()
    with stub.building():
        engine = build_engine(settings, settings.stage(stage), platform, groups)
    for module, group in engine.weight_owners():
        for weight in weight_slices(module, group):
            generator = torch.Generator().manual_seed(seed * zlib.crc32(weight.name.encode()))
            weight.fill(torch.randn(weight.full_shape, generator=generator))
    engine.reload_optimizer()
    sharded_state.optimizer_parts(engine.state(), is_loading=True)  # makes the moments
    for optimizer in engine.state().optimizers:
        for parameter, moments in optimizer.optimizer.state.items():
            for name, factor in ("exp_avg", 0.5), ("exp_avg_sq", 2.0):
                moments[name].copy_(parameter.detach() * factor)
    return engine


def weights(engine: Engine) -> dict[str, tuple[Any, ...]]:
    """name -> numbers, and all that Megatron is told about a weight."""
    return {
        weight.name: (
            weight.parameter.detach().clone(),
            (weight.dim, weight.stride, weight.full_shape, weight.parameter.dtype, weight.parameter.requires_grad),
            getattr(weight.parameter, "sequence_parallel", False),
        )
        for module, group in engine.weight_owners()
        for weight in weight_slices(module, group)
    }


def stored(engine: Engine) -> dict[tuple[Any, ...], Tensor | None]:
    """(key, place, replica) in a checkpoint -> numbers, weights' and optimizer's."""
    state = engine.state()
    entries = sharded_state.sharded_state(state, sharded_state.optimizer_parts(state, is_loading=False))
    apply_factories(entries)
    return {
        (entry.key, entry.global_shape, entry.global_offset, entry.replica_id): (
            entry.data.detach().clone() if isinstance(entry, ShardedTensor) else None
        )
        for entry in nested_values(entries)
        if isinstance(entry, ShardedBase)
    }


def differences(one: dict[Any, Any], other: dict[Any, Any]) -> list[str]:
    """Keys that are in one alone, or under which something differs by a bit."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, tuple):
            return all(map(same, a, b))
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    both = one.keys() & other.keys()
    return [*map(str, one.keys() ^ other.keys()), *(str(key) for key in both if not same(one[key], other[key]))]


def compare(recipe: str) -> tuple[int, list[str], list[str], set[str]]:
    groups = start(recipe)
    local, te = (build(recipe, implementation, 1, groups) for implementation in (LOCAL, TE))
    modules = {type(part).__name__ for module, _ in te.weight_owners() for part in module.modules()}
    mine = weights(local)
    return len(mine), differences(mine, weights(te)), differences(stored(local), stored(te)), modules


@each_case
def test_weights_and_what_is_stored_are_those_of_the_local_implementation(stubbed, case, recipe) -> None:
    answers = stubbed(CASES[case][0]).run(compare, recipe)
    assert [answer[1:3] for answer in answers] == [([], [])] * len(answers)
    assert sum(count for count, *_ in answers) > 30
    modules = set().union(*(modules for *_, modules in answers))
    assert modules >= {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention", "RMSNorm"}


def carry(recipe: str, source: str, target: str, folder: str, extra: bool) -> tuple[list[str], list[str]]:
    """Save by one implementation, with ``extra`` states or without, and load into the other; what differs before that
    and behind it."""
    groups = start(recipe)
    left, right = build(recipe, source, 1, groups), build(recipe, target, 2, groups)
    model = json.loads(json.dumps(asdict(load_recipe(Path(recipe)).model.eagle())))
    description = Description("second", 1, 6, model, {}, groups.dp_size)
    saver = Saver(Path(folder), groups, torch.device("cpu"), keep=1)
    as_they_are = mock.patch.object(sharded_state, "_without_extra_state", lambda entry, *, fp8: entry)
    with as_they_are if extra else nullcontext():
        saver.start(description, left.state(), b"place" if groups.is_reader else None)
        saver.finish(must=True)
    apart = differences(weights(left), weights(right))
    place = load_training_state(Path(folder) / "step_00000001", description, right.state(), groups)
    assert place == (b"place" if groups.is_reader else None)
    return apart, differences(weights(left), weights(right)) + differences(stored(left), stored(right))


@each_case
@each_way
def test_each_loads_what_the_other_has_saved(stubbed, case, recipe, tmp_path, source, target) -> None:
    """Weights and Adam's moments, bit by bit."""
    answers = stubbed(CASES[case][0]).run(carry, recipe, source, target, str(tmp_path / "stage"), False)
    assert all(apart and not differing for apart, differing in answers), answers
    assert extra_states(tmp_path / "stage" / "step_00000001") == set()


@each_way
@pytest.mark.parametrize("case", ["one", "tp", "pp"])
def test_so_with_checkpoints_from_before_2026_11_26(stubbed, case, recipe, tmp_path, source, target) -> None:
    """They hold the extra states of the implementation that wrote them."""
    answers = stubbed(CASES[case][0]).run(carry, recipe, source, target, str(tmp_path / "stage"), True)
    assert all(apart and not differing for apart, differing in answers), answers
    extra = extra_states(tmp_path / "stage" / "step_00000001")
    assert "language.decoder.layers.mlp.linear_fc1" in extra
    assert ("language.decoder.final_layernorm" in extra) == (source == TE), "what could not be loaded"


def extra_states(checkpoint: Path) -> set[str]:
    """The modules that have one in ``checkpoint``."""
    keys = (key.partition("/")[0] for key in read_index(checkpoint).state_dict_metadata)
    return {key.removesuffix("._extra_state") for key in keys if key.endswith("_extra_state")}


def load_converted(recipe: str, folder: str) -> tuple[list[str], list[str]]:
    groups = start(recipe)
    engines = [build(recipe, implementation, seed, groups) for seed, implementation in enumerate((LOCAL, TE), 1)]
    apart = differences(*map(weights, engines))
    for engine in engines:
        load_weights(Path(folder), [module for module, _ in engine.weight_owners()])
    return apart, differences(*map(weights, engines))


@each_case
def test_a_converted_checkpoint_loads_into_both(stubbed, case, recipe, tmp_path) -> None:
    config = load_recipe(Path(recipe)).model.eagle()
    source = tmp_path / "released"
    checkpoint_cases.write_released(source, config, Dialect.published(config, "A"), ours=True)
    hf_to_megatron([source], tmp_path / "converted", Options(logits=False))
    assert extra_states(tmp_path / "converted") == set()
    answers = stubbed(CASES[case][0]).run(load_converted, recipe, str(tmp_path / "converted"))
    assert all(apart and not differing for apart, differing in answers), answers


def test_whatever_is_called_of_the_stub_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"transformer_engine_torch\.rmsnorm_fwd was called"):
        stub._Compiled(stub.COMPILED).rmsnorm_fwd(1)
