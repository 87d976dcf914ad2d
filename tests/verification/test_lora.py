"""`verify --lora`: adapters against PEFT's, and mistakes that are found. Dropout has a test of its own: it cannot be
PEFT's number for number."""

from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_eagle.config.lora import LoraSettings, is_adapter
from megatron_eagle.verification import check
from megatron_eagle.verification.check import TOLERANCES, Verifier
from megatron_eagle.verification.rows import Row, quick_table

pytest.importorskip("peft")


def without_the_scale(row: Row, folder: str) -> tuple[float, float, float]:
    """Where a layer's outputs are split, B A is added as it is."""
    from megatron_eagle.model import lora

    inner = lora._Adapted._inner

    def unscaled(self, x):
        column = isinstance(self, lora.AdaptedColumn) and self.tp_group.size() > 1
        return inner(self, x) / (self.lora.settings.scale if column else 1.0)

    with patch.object(lora._Adapted, "_inner", unscaled):
        return check.measure(row, folder)


def with_the_other_shard(row: Row, folder: str) -> tuple[float, float, float]:
    """Each process has the rows of B that are its neighbour's."""
    load = check.load_reference

    def swapped(engine, *weights):
        load(engine, *weights)
        for module, _ in engine.weight_owners():
            for name, parameter in module.named_parameters():
                if name.endswith("linear_qkv.lora_b"):
                    parts = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
                    dist.all_gather(parts, parameter.detach())
                    parameter.data.copy_(parts[1 - dist.get_rank()])
        engine.reload_optimizer()

    with patch.object(check, "load_reference", swapped):
        return check.measure(row, folder)


def with_one_matrix_for_all(row: Row, folder: str) -> tuple[float, float, float]:
    """k and v are multiplied with the A of q, as where a fused layer is given one."""
    from megatron_eagle.model import lora

    rows = lora._rows

    def first(*arguments):
        found = rows(*arguments)
        return torch.nn.functional.one_hot(torch.zeros(len(found), dtype=torch.int64), found.shape[1])

    with patch.object(lora, "_rows", first):
        return check.measure(row, folder)


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as verifier:
        yield verifier


@pytest.mark.parametrize(
    "row",
    [
        Row(tp=2, sequence_parallel=True, recompute="full"),
        pytest.param(Row(pp=2, encoder="spread", trainable="connector"), marks=pytest.mark.long),
        # More processes than key/value heads: some have no row of k or v.
        pytest.param(Row(tp=4), marks=pytest.mark.long),
    ],
)
def test_equal_to_peft(verifier: Verifier, row: Row) -> None:
    result = verifier.check(replace(row, lora=True))
    assert result.ok, result


def drawn(layout: dict) -> dict[str, torch.Tensor]:
    """In a process of a world: its part of every A as a run draws it, by the layer's name."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.layout import Layout
    from megatron_eagle.model.lora import _Adapted
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.engine import build_engine
    from megatron_eagle.verification.subject import tables_subject

    platform = install()
    recipe = replace(check._recipe(Row(lora=True), tables_subject()), layout=Layout(**layout))
    groups = initialise(recipe.layout, platform, timeout=timedelta(seconds=60))
    engine = build_engine(recipe, recipe.stages[0], platform, groups)
    layers = [layer for module, _ in engine.weight_owners() for layer in module.modules()]
    return {layer.lora.name: layer.lora_a.detach().clone() for layer in layers if isinstance(layer, _Adapted)}


def test_each_process_draws_its_part_of_the_same_adapter(worlds) -> None:
    """Where inputs are split the parts are those of one process side by side; else every process has the whole A."""
    (whole,) = worlds(1).run(drawn, {})
    parts = worlds(2).run(drawn, {"tp": 2})
    split = {name for name, a in whole.items() if parts[0][name].shape != a.shape}
    assert {name.split(".")[-2] for name in split} == {"linear_proj", "linear_fc2"}
    for name, a in whole.items():
        if name in split:
            assert torch.equal(a, torch.cat([part[name] for part in parts], 1)), name
        else:
            assert all(torch.equal(a, part[name]) for part in parts), name


@pytest.mark.parametrize("mistake", [without_the_scale, with_the_other_shard, with_one_matrix_for_all])
def test_a_mistake_makes_the_row_wrong(verifier: Verifier, mistake) -> None:
    result = verifier.check(Row(tp=2, lora=True), measure=mistake)
    assert result.error is None, result.error
    assert result.loss_rel > 10 * TOLERANCES["fp32"].loss and result.grad_rel > 100 * TOLERANCES["fp32"].gradient


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_row_of_the_quick_table_equals_peft(verifier: Verifier) -> None:
    results = verifier.check_all([replace(row, lora=True) for row in quick_table(4)], lambda result: None)
    assert [result.row.describe() for result in results if not result.ok] == []


MISTAKES = {"none": None, "alike": lambda *_, **__: 7, "own": lambda name, *_, **__: hash((len(name), dist.get_rank()))}


def masks(layout: dict, mistake: str = "none") -> tuple[dict[str, tuple], float]:
    """In a process of a world: each layer's first mask, and how far copies of a parameter are apart over the
    tensor-parallel processes after two steps with dropout. mistake: what stands for the right place of a mask."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.layout import Layout
    from megatron_eagle.model import lora
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.engine import build_engine
    from megatron_eagle.training.step import Step
    from megatron_eagle.verification.subject import tables_subject

    subject, platform = tables_subject(), install()
    recipe = replace(
        check._recipe(Row(lora=True), subject),
        layout=Layout(**layout),
        lora=LoraSettings(rank=2, dropout=0.5, targets=("vision", "connector", "language")),
    )
    groups = initialise(recipe.layout, platform, timeout=timedelta(seconds=60))
    drop, first = lora._drop, {}

    def seen(x, numbers):
        left = drop(x, numbers)
        first.setdefault(numbers.name, (tuple(x.shape), sha256((left != 0).numpy().tobytes()).hexdigest()))
        return left

    with patch.object(lora, "_place", MISTAKES[mistake] or lora._place):
        engine = build_engine(recipe, recipe.stages[0], platform, groups)
    step = Step(engine, groups, recipe.stages[0], platform.device)
    with patch.object(lora, "_drop", seen):
        for packs in subject.steps["packed"][:2]:
            own = packs[groups.dp_rank :: groups.dp_size]
            step.run(lambda own=own: list(own))
    apart = 0.0
    for module, group in engine.weight_owners():
        for name, parameter in module.named_parameters():
            if is_adapter(name) and not getattr(parameter, "tensor_model_parallel", False):
                low, high = parameter.detach().clone(), parameter.detach().clone()
                dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
                dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
                apart = max(apart, float((high - low).max()))
    return first, apart


QKV, PROJ = (f"language.decoder.layers.0.self_attention.linear_{name}." for name in ("qkv", "proj"))


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2, "sequence_parallel": True},
        {"tp": 2, "encoder": "spread"},
        *(pytest.param(layout, marks=pytest.mark.long) for layout in ({"tp": 2}, {})),
    ],
)
def test_masks_are_alike_where_the_input_is_and_only_there(worlds, layout: dict) -> None:
    """And copies of a parameter stay the same to the last bit, which other masks for the same input would end."""
    (first, apart), (second, _) = worlds(2).run(masks, layout)
    assert apart == 0.0
    shared = layout == {"tp": 2} or layout.get("encoder") == "spread"
    assert (first[QKV] == second[QKV]) == shared and first[PROJ] != second[PROJ]
    assert len(set(first.values())) == len(first)
    assert first[PROJ][0] == second[PROJ][0]  # so that it is the draws that differ


def test_seeds_alike_and_seeds_of_its_own_for_each_rank_are_seen(worlds) -> None:
    """What the test above refuses."""
    (first, _), (second, _) = worlds(2).run(masks, {}, "alike")
    assert first[PROJ] == second[PROJ]
    (_, apart), _ = worlds(2).run(masks, {"tp": 2}, "own")
    assert apart > 1e-6
