"""Every shipped recipe fits on the GPUs it names, and a plan that does not fit names one that does."""

from pathlib import Path

import pytest

from megatron_eagle.cli import main
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.planning.hardware import load_hardware
from megatron_eagle.planning.plan import plan_stage
from megatron_eagle.planning.samples import Mix

RECIPES = sorted(path.parent.name for path in (Path(__file__).parents[2] / "examples").glob("eagle*/recipe.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_fits_on_the_gpus_it_names(name: str) -> None:
    recipe, hardware = load_recipe(Path(name), []), load_hardware("h100")
    for stage in recipe.stages:
        plan = plan_stage(recipe, stage, stage.gpus, hardware, Mix(packing=recipe.reading.packing))
        assert plan.fits, (stage.name, plan.peak / 1e9)


@pytest.mark.slow
def test_a_plan_that_says_no_ends_with_two_and_names_the_nearest_layout(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "eagle2-1b", "--stage", "stage2"]
    with pytest.raises(SystemExit) as ended:
        main([*line, "stages.stage2.layout={tp: 1}"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("megatron-eagle: stage2 needs 81.4 GB on 256 h100, 74.0 are there")
    override = said.rpartition("'stages.stage2.")[2].rstrip("'\n")
    with pytest.raises(SystemExit) as ended:
        main([*line, f"stages.stage2.{override}"])
    assert ended.value.code == 0


@pytest.mark.slow
def test_where_nothing_near_fits_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "eagle2-34b", "--stage", "stage2", "--gpus", "1", "stages.stage2.layout={tp: 1}", "--batch", "1"]
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2 and "no layout near this one fits" in capsys.readouterr().err
