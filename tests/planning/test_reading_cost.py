"""Whether reading keeps up, against what is worked out by hand."""

from dataclasses import replace

import pytest

from megatron_eagle.config.reading import ReadingSettings
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.planning.hardware import load_hardware
from megatron_eagle.planning.plan import StagePlan, plan_stage
from megatron_eagle.planning.reading import SAMPLE_SECONDS, TILE_SECONDS, reading_line, reading_of
from megatron_eagle.planning.samples import Mix


@pytest.fixture(scope="module")
def plan() -> StagePlan:
    """Of 1 000 tiles and 100 samples a step on 4 readers, a step of 2 s."""
    recipe = load_recipe("tiny", ["layout={}", "stages.stage1.batch=4"])
    made = plan_stage(recipe, recipe.stage("stage1"), 4, load_hardware("cpu"), Mix(200), simulated=1)
    return replace(made, tiles=1000.0, samples=100.0, seconds=2.0)


def settings(workers: int, **others) -> ReadingSettings:
    return ReadingSettings(workers=workers, **others)


def test_cores_and_waiting(plan) -> None:
    seconds = (1000 * TILE_SECONDS + 100 * SAMPLE_SECONDS) / 4
    assert seconds == pytest.approx(0.376, abs=0.001)
    beside = reading_of(plan, settings(1))
    assert (beside.seconds, beside.cores, beside.waits) == (pytest.approx(seconds), pytest.approx(seconds / 2), 0)
    assert reading_of(plan, settings(0)).waits == pytest.approx(seconds)  # the step waits for all of it


def test_what_is_said(plan) -> None:
    need = "a reader needs 0.19 cores (250 tiles a step, 0.38 s)"
    assert reading_line(plan, settings(4)) == f"reading keeps up: {need}, reading.workers=4"
    assert reading_line(plan, settings(0)) == (
        f"reading adds 0.38 s to each step: {need}; reading.workers=0 reads between steps, 1 would keep up"
    )
    quick = replace(plan, seconds=0.1)
    assert reading_line(quick, settings(2)) == (
        "reading adds 0.09 s to each step: a reader needs 3.76 cores (250 tiles a step, 0.38 s); "
        "reading.workers=2 are too few, 4 would keep up"
    )
    assert reading_of(quick, settings(4)).waits == 0
    assert reading_line(plan, settings(1, decoder="dali")) == "reading by DALI is not planned"
