"""The search that stops early finds what planning everything finds."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.recipe import Recipe, load_recipe
from megatron_eagle.planning import search as searching
from megatron_eagle.planning.hardware import load_hardware
from megatron_eagle.planning.plan import StagePlan, plan_stage
from megatron_eagle.planning.samples import Mix
from megatron_eagle.planning.search import candidates, planned, search, with_layout

EXAMPLES = Path(__file__).parents[2] / "examples"
H100 = load_hardware("h100")


def recipe_of(name: str, batch: int) -> Recipe:
    recipe = load_recipe(EXAMPLES / name / "recipe.yaml").with_kernels_on("cuda")
    return recipe.with_stage("stage1.5", batch=batch)


def named(plan: StagePlan) -> tuple[Layout, str, int | None]:
    return plan.layout, plan.recompute, plan.recompute_layers


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer choices: to plan them all takes minutes otherwise."""
    for name, choices in {"SIZES": (1, 2, 4), "VIRTUAL": (None, 2), "RECOMPUTE": ("none", "full")}.items():
        monkeypatch.setattr(searching, name, choices)
    monkeypatch.setattr(searching, "LAYERS_AGAIN", (1, 4, 12))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("name", "gpus", "batch"), [("eagle2-9b", 4, 8), ("eagle2.5-8b", 4, 4)])
def test_the_pruned_search_equals_planning_everything(
    name: str, gpus: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, mix = recipe_of(name, batch), Mix()
    stage = recipe.stage("stage1.5")
    looked_at = []
    monkeypatch.setattr(searching, "planned", lambda one, *rest: looked_at.append(one) or planned(one, *rest))
    found = search(recipe, stage, gpus, H100, mix, keep=3)
    everything, fewest = [], {}
    ways = list(candidates(recipe, stage, gpus, H100, mix))
    for one in sorted(ways, key=lambda one: one.layers or 0):
        plan = planned(one, recipe, stage, gpus, H100, mix)
        if plan and not (one.layers and one.layout in fewest):
            if one.layers or one.recompute == "none":
                fewest[one.layout] = one.layers
            everything.append(plan)
            assert one.least <= plan.seconds, one
    everything.sort(key=lambda plan: plan.seconds)
    assert [plan.seconds for plan in found] == [plan.seconds for plan in everything[:3]]
    assert named(found[0]) == named(everything[0])
    assert len(looked_at) < 0.7 * len(ways)


def test_as_few_layers_as_must_be_are_computed_again_where_the_search_needs_it() -> None:
    """With 1 GB less than the fastest layout needs, the best computes some layers again, and no fewer would fit."""
    recipe = load_recipe("eagle2.5-8b", [])
    stage, small = recipe.stage("stage1.5"), replace(H100, memory_bytes=7.146e10)
    best = search(recipe, stage, 128, small, Mix(), keep=1)[0]
    assert best.recompute_layers and best.fits
    numbers = [0, *searching.LAYERS_AGAIN]
    fewer = numbers[numbers.index(best.recompute_layers) - 1]
    variant = with_layout(recipe, stage, best.layout, "full" if fewer else "none", fewer or None)
    assert not plan_stage(variant, variant.stage(stage.name), 128, small, Mix(), simulated=1).fits
