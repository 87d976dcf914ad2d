"""Frozen layers, rates by layer and noise against the reference, where they are by hand; and mistakes that show."""

from dataclasses import replace
from datetime import timedelta
from functools import partial
from unittest.mock import patch

import pytest

from megatron_eagle.compat.platform import install
from megatron_eagle.config.layout import Layout
from megatron_eagle.parallel.groups import initialise
from megatron_eagle.training.engine import build_engine
from megatron_eagle.training.step import Step
from megatron_eagle.verification import check
from megatron_eagle.verification.check import TOLERANCES, Verifier
from megatron_eagle.verification.rows import Row
from megatron_eagle.verification.subject import tables_subject


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as verifier:
        yield verifier


ROWS = [
    Row(pp=2, uneven=True, encoder="spread", tuned=True),
    Row(cp=2, distributed_optimizer=False, packing="single", tuned=True),
]
MORE_ROWS = [
    Row(tp=2, sequence_parallel=True, recompute="full", tuned=True),
    Row(pp=2, vpp=2, overlap=True, tuned=True),
    Row(tp=2, pp=2, tuned=True),
]


@pytest.mark.parametrize("row", ROWS, ids=Row.describe)
def test_equal_to_the_reference(verifier: Verifier, row: Row) -> None:
    result = verifier.check(row)
    assert result.ok, result


@pytest.mark.long
@pytest.mark.parametrize("row", MORE_ROWS)
def test_equal_to_the_reference_in_more_layouts(verifier: Verifier, row: Row) -> None:
    result = verifier.check(row)
    assert result.ok, result


def with_a_rank_s_own_numbers(row: Row, folder: str) -> tuple[float, float, float]:
    """Rates go by layers that are counted from each process's first one."""
    from megatron_eagle.training import optimizer

    slices = optimizer.weight_slices

    def local(module, group):
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for weight in slices(module, group):
            object.__setattr__(weight, "name", names[id(weight.parameter)])
            yield weight

    with patch.object(optimizer, "weight_slices", local):
        return check.measure(row, folder)


def with_a_seed_for_each_process(row: Row, folder: str) -> tuple[float, float, float]:
    """Noise is drawn from the place that a process has."""
    import torch.distributed as dist

    from megatron_eagle.model.noise import EmbeddingNoise

    draw = EmbeddingNoise.draw

    def own(self, identity, *rest):
        return draw(self, f"{identity}/{dist.get_rank()}", *rest)

    with patch.object(EmbeddingNoise, "draw", own):
        return check.measure(row, folder)


def without_gradients_through_frozen_layers(row: Row, folder: str) -> tuple[float, float, float]:
    """Recomputed layers behind a frozen embedding get an input that needs no gradient."""
    from megatron_eagle.training import engine

    with patch.object(engine, "pass_gradients", lambda model: None):
        return check.measure(row, folder)


@pytest.mark.parametrize(
    "row, mistake",
    [
        (Row(pp=2, uneven=True, encoder="spread", tuned=True), with_a_rank_s_own_numbers),
        (Row(tp=2, tuned=True), with_a_seed_for_each_process),
        (Row(tp=2, sequence_parallel=True, recompute="full", tuned=True), without_gradients_through_frozen_layers),
    ],
)
def test_a_mistake_makes_the_row_wrong(verifier: Verifier, row: Row, mistake) -> None:
    result = verifier.check(row, measure=mistake)
    assert result.error is None, result.error
    assert max(result.grad_rel, result.weight_rel) > 100 * TOLERANCES["fp32"].gradient


def losses(layout: Layout) -> list[float]:
    """In every process of a world: of steps that train the upper half of the language model alone."""
    platform, subject = install(), tables_subject()
    recipe = check._recipe(Row(pp=layout.pp), subject)
    upper = {"trainable": ("language",), "freeze": ("language.embeddings", "language.layers[:-4]")}
    recipe = replace(recipe, layout=layout, stages=(replace(recipe.stages[0], **upper),))
    groups = initialise(layout, platform, timeout=timedelta(seconds=60))
    step = Step(build_engine(recipe, recipe.stages[0], platform, groups), groups, recipe.stages[0], platform.device)
    return [step.collect(step.run(partial(list, packs))).loss for packs in subject.steps["packed"]]


def test_a_pipeline_stage_may_have_nothing_to_train_and_nothing_in_front_that_does(worlds) -> None:
    (whole,) = worlds(1).run(losses, Layout())
    for cut in worlds(2).run(losses, Layout(pp=2)):
        assert cut == pytest.approx(whole, rel=1e-6) and len(set(cut)) == len(cut) == 3
