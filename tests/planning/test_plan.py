"""Plans, searches, hardware profiles and the published hours."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.presets import PRESETS
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.errors import UserError
from megatron_eagle.model.cost import Parts
from megatron_eagle.planning.activations import ROWS_OF_LOGITS, Activations, PackShape
from megatron_eagle.planning.hardware import hardware_as_yaml, load_hardware, shipped_hardware
from megatron_eagle.planning.plan import plan_stage
from megatron_eagle.planning.published import (
    BRACKET,
    PUBLISHED,
    Software,
    as_published,
    matching_tokens,
    software,
)
from megatron_eagle.planning.report import layout_as_yaml, search_table, stage_line, stage_table
from megatron_eagle.planning.samples import Given, Mix
from megatron_eagle.planning.search import search, with_layout
from megatron_eagle.planning.timing import Timing, link_rate, ring_rate

EXAMPLES = Path(__file__).parents[2] / "examples"
H100 = load_hardware("h100")


def eagle(name="eagle2-9b"):
    return load_recipe(EXAMPLES / name / "recipe.yaml")


def planned(layout, recompute="selective", stage="stage1.5", gpus=256, mix=None):
    recipe = eagle()
    variant = with_layout(recipe, recipe.stage(stage), layout, recompute)
    return plan_stage(variant, variant.stage(stage), gpus, H100, mix or Mix())


def test_every_stage_is_planned_in_its_own_layout():
    overrides = ["layout.tp=2", "stages.stage1.5.layout.tp=4", "stages.stage1.5.layout.encoder=spread"]
    recipe = load_recipe(EXAMPLES / "eagle2-9b" / "recipe.yaml", overrides)
    first, last = (plan_stage(recipe, recipe.stage(name), 256, H100, Mix()).layout for name in ("stage1", "stage1.5"))
    assert (first, last) == (recipe.layout, replace(recipe.layout, tp=4, encoder="spread")) and first.tp == 2


def test_spreading_the_encoders_balances_the_pipeline():
    """Even layers, two encoders on the first of four stages: about 48 % by the shares of the profile."""
    stuck, spread = planned(Layout(pp=4)), planned(Layout(pp=4, encoder="spread"))
    assert 0.40 < stuck.timeline.balance < 0.50
    assert "encoders on stage 0: stage 0 100%, stage 1 2" in stage_line(stuck) and "48% of" in stage_line(stuck)
    assert "outside the pipeline: stage 0 6" in stage_line(spread)
    assert spread.timeline.balance > 0.75
    evened = planned(Layout(pp=4, encoder="spread", layers_per_stage=(8, 8, 7, 5)))
    assert evened.timeline.balance > 0.95
    assert evened.mfu > 1.5 * stuck.mfu


def test_the_published_hours_of_all_stages_come_out_at_lengths_within_the_bracket():
    """With rates of 40 % of the planner's and ZeRO-3 at one adapter's speed; docs/plans.md has the other pairs."""
    recipe = eagle()
    used = Software(0.4, link_rate(H100, 256))
    assert used in software(H100)
    for name, published in PUBLISHED.items():
        tokens = matching_tokens(recipe, recipe.stage(name), H100, used)
        assert tokens is not None and BRACKET[0] < tokens < BRACKET[1]
        hours, mfu = as_published(recipe, recipe.stage(name), H100, tokens, used)
        # Packs fill in steps as samples grow, so hours jump a little where bisection ends.
        assert hours == pytest.approx(published.hours, rel=0.08)
        assert 0.05 < mfu < 0.3


def test_a_ring_between_nodes_runs_through_all_their_adapters():
    assert ring_rate(H100, 8, 1) == ring_rate(H100, 4, 2) == 450e9 * 0.82
    assert ring_rate(H100, 256, 1) == pytest.approx(8 * 50e9 * 0.82)
    assert ring_rate(H100, 32, 8) == pytest.approx(50e9 * 0.82)


def test_copies_of_spread_encoders_are_summed_up_also_where_there_is_one_replica():
    few = eagle().stage("stage1.5")
    recipe = replace(eagle(), stages=(replace(few, batch=8),))
    one = {"layers_per_stage": (8, 8, 7, 5), "pp": 4}
    plans = []
    for layout in (Layout(**one), Layout(**one, encoder="spread")):
        variant = with_layout(recipe, recipe.stages[0], layout, "full")
        plans.append(plan_stage(variant, variant.stages[0], 4, H100, Mix()))
    assert plans[0].reduction == 0.0
    copy = 1.29e9  # parameters (docs/encoder_placement.md), 4 bytes of gradient and 2 of weight, 3/4 of them move
    assert plans[1].reduction == pytest.approx(copy * (4 + 2) * 0.75 / (450e9 * 0.82), 0.02)


def test_starting_a_layer_costs_a_cpu_time_of_its_own_and_a_gpu_none():
    config = eagle().model.eagle()
    sizes = Activations(config, Layout(), Parts(True, True, True))
    work = PackShape((4096,), 0)
    ahead = Timing(sizes, H100).layer(work)
    slow = Timing(sizes, replace(H100, launches_ahead=False)).layer(work)
    assert slow.forward == pytest.approx(ahead.forward + H100.launch)
    assert slow.backward == pytest.approx(ahead.backward + 2 * H100.launch)
    assert Timing(sizes, replace(H100, launch=1.0)).layer(work).forward == 1.0


def test_what_does_not_fit_says_so():
    assert not planned(Layout(), "none").fits
    assert "NO (74)" in stage_table([planned(Layout(), "none")])


def test_utilisation_stays_below_what_the_rates_allow():
    for layout in (Layout(), Layout(tp=4, sequence_parallel=True), Layout(pp=2, encoder="spread")):
        assert 0.05 < planned(layout).mfu < H100.products


@pytest.mark.slow
def test_a_search_finds_what_fits_and_its_first_line_can_be_pasted():
    recipe = eagle("eagle2-1b")
    plans = search(recipe, recipe.stage("stage1.5"), 256, H100, Mix(), keep=3)
    assert plans and all(plan.fits for plan in plans)
    assert [plan.seconds for plan in plans] == sorted(plan.seconds for plan in plans)
    line = search_table(plans).splitlines()[-1].removeprefix("layout: ")
    assert Layout(**yaml.safe_load(line)) == replace(plans[0].layout)
    assert yaml.safe_load(layout_as_yaml(Layout())) == {}


def test_profiles_explain_every_number(tmp_path):
    assert list(shipped_hardware()) == ["a100", "b200", "cpu", "h100", "h200", "rtx4090"]
    for name in list(shipped_hardware()):
        assert load_hardware(name).usable_bytes > 0
    own = tmp_path / "own.yaml"
    own.write_text(hardware_as_yaml(H100).replace("  latency:", "  lateness:"))
    with pytest.raises(UserError, match="no source for latency"):
        load_hardware(str(own))
    with pytest.raises(UserError, match="no hardware profile 'h900'"):
        load_hardware("h900")


def test_wrong_numbers_are_refused():
    with pytest.raises(UserError, match="batch=1024 packs cannot be shared out to 3 replicas"):
        planned(Layout(), gpus=3)
    with pytest.raises(UserError, match="7 processes cannot be split"):
        planned(Layout(tp=2, sequence_parallel=True), gpus=7)


def test_packs_are_ragged_and_within_bounds():
    packs, samples = Mix(tokens_per_sample=1500).packs(40, 8192, 256)
    assert all(pack.length == 8192 for pack in packs)
    assert len({pack.segments for pack in packs}) == len(packs) and len({pack.tiles for pack in packs}) > 1
    assert samples > len(packs)


def test_kernels_hold_no_logits_and_the_plan_knows_how_many_rows_they_make() -> None:
    kernel = (Path(__file__).parents[2] / "kernels/eagle_kernels/linear_cross_entropy/__init__.py").read_text()
    assert f"rows_per_chunk: int = {ROWS_OF_LOGITS}," in kernel
    config, parts = PRESETS["eagle2-9b"], Parts.of(("language",))
    pack = PackShape((16_384,), 0)
    torch_ops, triton = (Activations(config, Layout(), parts, kernels=kernels) for kernels in ("torch", "triton"))
    logits = 16_384 * config.language.padded_vocab_size * 4
    norm = hidden = 16_384 * 3584 * 2  # the norm keeps its input
    assert torch_ops.head(pack).saved > logits
    weight = 4 * config.language.padded_vocab_size * 3584
    assert triton.head(pack).saved == pytest.approx(norm + hidden + weight, rel=0.001)


def test_a_plan_takes_the_kernels_that_its_hardware_runs() -> None:
    recipe, tiny = eagle(), load_recipe(EXAMPLES / "tiny" / "recipe.yaml")
    peaks = {}
    for kernels in (None, "triton", "torch"):
        variant = replace(recipe, model=replace(recipe.model, kernels=kernels))
        peaks[kernels] = plan_stage(variant, variant.stage("stage1"), 128, H100, Mix()).memory[-1].peak
    assert peaks[None] == peaks["triton"] < peaks["torch"]
    on_cpu = tiny.with_kernels_on(load_hardware("cpu").device)
    assert on_cpu.model.kernels == "torch" and Activations.of(on_cpu, on_cpu.stages[0]).kernels == "torch"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_mean_of_weights_costs_bytes_and_the_update_no_time(precision: str) -> None:
    """The planned update is of the weights that train, whatever else is kept beside them."""
    recipe = replace(eagle("eagle2-1b"), precision=precision)
    plain = recipe.stages[0]
    with_mean = recipe.with_stage(plain.name, ema=0.999)
    without, mean = (plan_stage(one, one.stages[0], 128, H100, Mix()) for one in (recipe, with_mean))
    assert mean.update == pytest.approx(without.update, rel=1e-12) and mean.seconds == pytest.approx(without.seconds)
    states = without.memory[0].optimizer / (12 if precision == "bf16" else 8)
    assert mean.memory[0].optimizer - without.memory[0].optimizer == 4 * states


def test_packs_shared_by_as_many_ranks_as_they_need_are_faster_than_by_all_and_hold_more():
    """One pack with a segment of its own length among seven of shorter ones, on eight GPUs without tiles."""
    long, middle, short = (PackShape((131_072 // count,) * count, 0) for count in (1, 4, 32))
    recipe = eagle("eagle2.5-8b")
    stage = replace(recipe.stage("stage4"), batch=8)
    recipe = replace(recipe, stages=(stage,))

    def of(**layout):
        variant = with_layout(recipe, stage, Layout(**layout), "full")
        return plan_stage(variant, variant.stages[0], 8, H100, Given((long, middle, middle) + (short,) * 5))

    alone, all_share, shared = of(), of(cp=8), of(cp=8, least_cp=1)
    assert shared.seconds < all_share.seconds < alone.seconds
    assert alone.memory[0].activations == shared.memory[0].activations > all_share.memory[0].activations
    assert abs(shared.timeline.bubble) < 0.15 and "cp=8 least_cp=1" in stage_table([shared])
