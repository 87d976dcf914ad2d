"""Every stage of every recipe that comes along fits on the GPUs that it names, by our own plan."""

import pytest

from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.config.shipped import shipped_recipes
from megatron_eagle.planning.hardware import load_hardware
from megatron_eagle.planning.plan import plan_stage
from megatron_eagle.planning.samples import Mix

PUBLISHED = sorted(set(shipped_recipes()) - {"tiny"})


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_stage_fits_where_it_says_it_runs(name: str) -> None:
    recipe, hardware = load_recipe(shipped_recipes()[name]), load_hardware("h100")
    mix = Mix(packing=recipe.reading.packing)
    for stage in recipe.stages:
        assert stage.gpus, f"{name}, {stage.name} names no number of GPUs"
        plan = plan_stage(recipe, stage, stage.gpus, hardware, mix)
        assert plan.fits, (name, stage.name, plan.layout)
