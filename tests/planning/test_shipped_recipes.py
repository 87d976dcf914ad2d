"""Every stage of every recipe that comes along fits on the GPUs that it names, by our own plan."""

import runpy

import pytest
from project import ROOT

from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.config.shipped import shipped_recipes
from megatron_eagle.planning.hardware import load_hardware
from megatron_eagle.planning.plan import plan_stage
from megatron_eagle.planning.report import one_line
from megatron_eagle.planning.samples import Mix

PLANS = runpy.run_path(str(ROOT / "benchmarks" / "plans.py"))
CARDS = PLANS["CARDS"]
PUBLISHED = sorted(set(shipped_recipes()) - {"tiny", "own-pictures"})  # for a CPU


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_stage_fits_where_it_says_it_runs(name: str) -> None:
    recipe, hardware = load_recipe(shipped_recipes()[name]), load_hardware(CARDS.get(name, "h100"))
    mix = Mix(packing=recipe.reading.packing)
    for stage in recipe.stages:
        assert stage.gpus, f"{name}, {stage.name} names no number of GPUs"
        plan = plan_stage(recipe, stage, stage.gpus, hardware, mix)
        assert plan.fits, (name, stage.name, plan.layout)


def test_recipes_for_fine_tuning_have_their_plan_in_the_head_and_on_the_page(monkeypatch) -> None:
    """python benchmarks/plans.py docs/plans.md writes both."""
    monkeypatch.chdir(ROOT)
    plans = list(PLANS["finetune"]())
    assert len(plans) == 8
    for file, plan in plans:
        assert f"# Plan: {one_line(plan)}\n" in file.read_text(encoding="utf-8"), file
    assert PLANS["finetune_section"]() in (ROOT / "docs" / "plans.md").read_text(encoding="utf-8")
