"""Every part at toy size on a CPU: its whole way runs, what only CUDA can say is skipped with the reason."""

from collections import Counter
from socket import gethostname
from types import SimpleNamespace

import pytest
import torch

from megatron_eagle.gpu_day.alone import NO_CUDA
from megatron_eagle.gpu_day.part import PROFILE, PartResult, Setting, part_of
from megatron_eagle.gpu_day.parts.optional import GRID, pillow_tiles, smooth_jpeg
from megatron_eagle.gpu_day.parts.syncs import judged
from megatron_eagle.gpu_day.sizes import EAGLE_1B, EAGLE_2B, EAGLE_9B, mix
from megatron_eagle.gpu_day.transformers_run import packed_rows, padded_rows, weighted_loss
from megatron_eagle.gpu_day.variants import compared
from megatron_eagle.planning.hardware import load_hardware
from megatron_eagle.planning.plan import plan_stage
from megatron_eagle.verification.packs import make_step
from megatron_eagle.verification.reference import ReferenceEagle, square_root_average
from megatron_eagle.verification.rows import CONFIG

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, megatron-eagle gpu-day --toy is the test"
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("day"), toy=True)


def run(name: str, setting: Setting) -> PartResult:
    found = part_of(name)(setting)
    assert found.wrong == () and PartResult.of(found.as_dict()) == found
    return found


def skipped(found: PartResult) -> str:
    return "; ".join(found.skipped)


@pytest.mark.long
def test_calibrate_leaves_a_profile_that_later_parts_plan_with(setting):
    run("calibrate", setting)
    assert load_hardware(str(setting.folder / PROFILE)).name == setting.hardware().name == f"cpu-{gethostname()}"


@pytest.mark.long
def test_train_is_set_beside_the_plan_and_transformers(setting):
    found = run("train_1b", setting)
    beside, planned = found.tables
    assert beside.title.startswith("eagle2-1b-toy:"), "nobody takes it for the model"
    assert [row[0] for row in beside.rows] == [
        "megatron-eagle",
        "transformers, padded, sdpa",
        "transformers, packed, sdpa",
    ]
    losses = [float(row[1]) for row in beside.rows]
    assert max(losses) - min(losses) < 0.01 * min(losses)
    assert [row[0] for row in planned.rows][-1] == "peak of tensors, GB"
    assert abs(float(planned.rows[-1][3].rstrip("%"))) <= 5
    assert (setting.folder / "traces" / "eagle2-1b-toy.json.gz").stat().st_size > 1000
    assert {row[5] for row in beside.rows} == {"-"} and beside.rows[1][6] == "-", (
        "no MFU, no memory that nobody counted"
    )
    assert NO_CUDA in skipped(found) and "flash_attn is not installed" in skipped(found)


@pytest.mark.long
def test_checkpoint_resumes_to_the_same_bits(setting):
    saved, offload = run("checkpoint", setting).tables
    assert ("losses after resuming", "the same bits") in saved.rows
    assert [row[0] for row in offload.rows] == ["full", "offload"]
    assert not (setting.folder / "checkpoint-part").exists()


@pytest.mark.long
def test_kernels_are_checked_and_nothing_is_timed(setting):
    found = run("kernels", setting)
    assert {row[0] for row in found.tables[0].rows} == {"tile_prepare"} and "no CUDA device" in skipped(found)
    times = run("kernel_times", setting)
    assert times.tables == () and times.charts == () and times.aims == ()
    for said in ("FlexAttention: needs", "torch varlen: needs", "torch.compile: needs", "eager: ran; not timed"):
        assert said in skipped(times)


@pytest.mark.slow
def test_attention_of_others_is_refused_with_the_reason(setting):
    found = run("core_attention", setting)
    assert [row[0] for row in found.tables[0].rows] == ["packed"]
    assert all(f"model.attention: {core} runs on CUDA only, this is cpu" in skipped(found) for core in ("varlen", "te"))


def test_a_first_loss_that_is_another_is_wrong():
    runs = {
        name: SimpleNamespace(losses=[loss, 1.0], seconds=[2.0], peak_bytes=3e9)
        for name, loss in {"packed": 4.0, "varlen": 4.01, "te": 4.5}.items()
    }
    table, wrong = compared("model.attention", runs, "eagle2-1b")
    assert table.rows[1] == ("varlen", "4.0100", "2.000", "3.00")
    assert wrong == ("first loss with te is 1.2e-01 away from packed's",)


@pytest.mark.slow
def test_syncs_and_optional_say_what_is_missing(setting):
    assert NO_CUDA in skipped(run("syncs", setting))
    found = run("optional", setting)
    assert all(name in skipped(found) or name in dict(found.values) for name in ("transformer_engine", "apex"))


@pytest.mark.long
def test_verify_runs_rows_of_one_process(setting):
    found = run("verify", setting)
    assert [row[-1] for row in found.tables[0].rows] == ["equal", "equal"] and "kernels" in skipped(found)


@pytest.mark.long
def test_several_processes_are_verified_and_scaled(setting):
    layouts, scaling = run("processes", setting).tables
    assert [row[-1] for row in layouts.rows] == ["equal", "equal"]
    assert [row[0] for row in scaling.rows] == ["1", "2"] and "over gloo" in scaling.title


@pytest.mark.long
def test_the_embedded_recipe_goes_all_its_way(setting):
    found = run("demo", setting)
    assert [row[:2] for row in found.tables[0].rows] == [("stage1", "2")]
    assert "stage2" not in str(found.values) and found.values["layout"]["world"] == 1


def test_a_hidden_wait_is_found():
    expected = Counter(
        {"/x/megatron_eagle/training/step_stats.py:90": 1, "/y/megatron/core/optimizer/clip_grads.py:9": 1}
    )
    assert judged(expected).wrong == ()
    hidden = expected + Counter({"/x/megatron_eagle/model/eagle.py:12": 3})
    assert judged(hidden).wrong == ("model/eagle.py waits 3 x, expected 0",)
    twice = expected + Counter({"/x/megatron_eagle/training/step_stats.py:91": 1})
    assert judged(twice).wrong == ("training/step_stats.py waits 2 x, expected 1",)


@pytest.mark.parametrize("rows_of", [padded_rows, packed_rows])
def test_transformers_rows_have_the_loss_of_each_sample_alone(rows_of):
    model = ReferenceEagle(CONFIG, 1, attention="sdpa")
    packs = make_step(CONFIG, "packed", 0)
    rows = [rows_of(pack) for pack in packs]
    with torch.no_grad():
        total = sum(float(one.weights.sum()) for one in rows)
        loss = sum(float(weighted_loss(model, one)) for one in rows) / total
        assert loss == pytest.approx(float(square_root_average(ReferenceEagle(CONFIG, 1), packs)), rel=1e-6)


@pytest.mark.parametrize("size", [EAGLE_1B, EAGLE_2B, EAGLE_9B], ids=lambda size: size.preset)
def test_sizes_fit_one_gpu_by_the_plan(size):
    recipe = size.recipe(toy=False)
    plan = plan_stage(recipe, recipe.stages[0], 1, load_hardware("h100"), mix(toy=False))
    assert plan.fits and plan.seconds * 22 < 240


def test_the_picture_that_decoders_are_compared_on_is_smooth():
    tiles = pillow_tiles(smooth_jpeg(), GRID)
    assert tiles.shape == (5, 3, 448, 448)
    assert int((tiles[0, :, :, 1:].int() - tiles[0, :, :, :-1].int()).abs().max()) <= 4


def test_a_cpu_is_planned_with_its_profile_until_it_is_calibrated(tmp_path):
    assert Setting(tmp_path, toy=True).hardware() == load_hardware("cpu")
