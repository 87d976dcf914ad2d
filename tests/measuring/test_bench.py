"""``bench`` end to end, its report, and the calibration of a profile. No test here depends on how fast a machine is."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from socket import gethostname

import pytest
from browser import assert_fits
from measured import recipe_of

from megatron_eagle.compat.platform import install
from megatron_eagle.config.layout import Layout
from megatron_eagle.data.sample.tokenizer import load_tokenizer
from megatron_eagle.data.stream.streams import open_stream
from megatron_eagle.errors import UserError
from megatron_eagle.measuring.bench import run_bench
from megatron_eagle.measuring.bench_report import read_measurement, table, write_report
from megatron_eagle.measuring.calibrate import (
    BAD_FIT,
    FITTED,
    Timed,
    _explained,
    calibrate,
    fit,
    predicted,
    variants,
    worst_error,
)
from megatron_eagle.model.cost import Parts
from megatron_eagle.planning.activations import Activations, PackShape
from megatron_eagle.planning.hardware import Hardware, hardware_as_yaml, load_hardware
from megatron_eagle.planning.samples import DataOf, Given, Mix, samples_of
from megatron_eagle.training.step import PHASES

ROOT = Path(__file__).parents[2]
RECIPE = recipe_of({"pp": 2, "layers_per_stage": [1, 2], "encoder": "spread"})
PACKS = Given((PackShape((300, 200, 12), 6, 12), PackShape((512,), 0)))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The command on the tiny recipe at reduced depth, in a process of its own."""
    folder = tmp_path_factory.mktemp("reports")
    command = [sys.executable, "-m", "megatron_eagle", "bench", "examples/tiny/recipe.yaml", "layout={}"]
    command += ["--stage", "stage1.5", "--layers", "1", "--batch", "2", "--steps", "2", "--profile"]
    done = subprocess.run([*command, "--runs", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "demo" / "bench", done.stdout


@pytest.mark.slow
def test_a_run_leaves_a_report_with_a_picture_and_a_trace(report):
    folder, printed = report
    (page,), (data,), (picture,) = (list(folder.glob(f"*.{kind}")) for kind in ("md", "json", "png"))
    assert page.stem == data.stem == picture.stem and "demo-stage1.5-tp1-pp1" in page.stem
    text = page.read_text()
    assert text in printed and str(page) in printed
    for part in ("step, s", *PHASES, "MFU of cpu's peak", "peak of tensors", f"({picture.name})", "1 decoder layers"):
        assert part in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    measured = read_measurement(data)
    assert len(measured.seconds) == 2 and measured.reduced == ["1 decoder layers instead of 3"]
    assert sum(measured.phases.values()) == pytest.approx(sum(measured.seconds) / 2)
    assert measured.peak_bytes == pytest.approx(measured.predicted_bytes, rel=0.05)
    html = page.with_suffix(".html").read_text()
    assert str(page.with_suffix(".html")) in printed and html.count(">step ") == 2 and ">planned<" in html
    for part in (*PHASES, "planned with the profile cpu", "MFU of cpu&#39;s peak"):
        assert part in html
    (trace,) = folder.glob("*-trace.json.gz")
    with gzip.open(trace) as file:
        assert any(event.get("name") == "aten::mm" for event in json.load(file)["traceEvents"])


@pytest.mark.slow
def test_the_page_fits_a_narrow_window(report, tmp_path):
    (data,) = report[0].glob("*.json")
    assert_fits(write_report(read_measurement(data), tmp_path, data).with_suffix(".html"), tmp_path)


@pytest.mark.slow
def test_two_reports_are_set_beside_each_other(report, tmp_path):
    (data,) = report[0].glob("*.json")
    before = read_measurement(data)
    slower = replace(before, seconds=[2 * s for s in before.seconds], mfu=before.mfu / 2, date="2031-01-01 00:00")
    text = write_report(slower, tmp_path, data).read_text()
    step = next(line for line in text.splitlines() if line.startswith("| step, s"))
    assert f"on {before.date}" in text and "+100.0%" in step
    assert "-50.0%" in next(line for line in text.splitlines() if "MFU" in line)
    assert "change" not in table(before)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json is no report"):
        read_measurement(tmp_path / "other.json")


def test_bytes_of_a_pipeline_are_those_of_the_plan(worlds):
    arguments = (RECIPE, RECIPE.stages[0], install(), load_hardware("cpu"), PACKS, 1)
    measured, none = worlds(2).run(run_bench, *arguments)
    assert none is None
    assert measured.peak_bytes == pytest.approx(measured.predicted_bytes, rel=0.05)
    assert measured.padding == pytest.approx(12 / 1024) and measured.predicted_seconds > 0


def test_the_stages_own_packs_can_be_measured_and_planned_with(small_run, worlds, tmp_path):
    recipe = small_run.recipe(tmp_path / "recipe.yaml")
    stage = recipe.stage("second")
    own = samples_of(recipe, stage, Mix())
    assert isinstance(own, DataOf) and "train" in own.describe()
    shapes, samples = own.packs(4, stage.pack_length, 16)
    tokenizer = load_tokenizer(recipe.tokenizer.kind, Path(recipe.tokenizer.path))
    stream = open_stream(recipe.data_settings(stage), tokenizer, seed=recipe.data_seed(stage))
    real = [next(stream) for _ in range(4)]
    assert [shape.tiles for shape in shapes] == [len(batch.tile_slots) for batch in real]
    assert [sum(shape.segments[:-1] if shape.padding else shape.segments) for shape in shapes] == [
        batch.useful_tokens for batch in real
    ]
    assert samples == sum(len(batch.sample_ids) for batch in real)
    elsewhere = replace(stage, blend=(replace(stage.blend[0], path="not/here"),))
    assert samples_of(recipe, elsewhere, Mix()) == Mix()
    measured = worlds(1).run(run_bench, recipe, stage, install(), load_hardware("cpu"), None, 1)[0]
    assert measured.packs_are == "the first of the stage's own data"
    assert measured.padding == pytest.approx(1 - sum(b.useful_tokens for b in real[:2]) / (2 * stage.pack_length))


def test_the_rates_behind_some_times_are_found_again():
    start = load_hardware("cpu")
    true = replace(start, products=0.31, attention=0.06, convolutions=0.12, memory_share=0.22, launch=4e-3)
    sizes = Activations(RECIPE.model.eagle(), Layout(), Parts(True, True, True), "fp32")
    runs = [Timed(pack, predicted(true, sizes, pack)) for pack in variants(4096, 16)]
    found = fit(start, sizes, runs)
    assert worst_error(start, sizes, runs) > 0.3
    assert worst_error(found, sizes, runs) < 0.01
    other = PackShape((700, 2000, 1396), 37)
    assert predicted(found, sizes, other) == pytest.approx(predicted(true, sizes, other), rel=0.02)


def test_a_calibrated_profile_can_be_read_back_and_names_its_sources(worlds, tmp_path):
    recipe = recipe_of({}, pack_length=256)
    found, none = worlds(2).run(calibrate, recipe, recipe.stages[0], install(), load_hardware("cpu"))
    assert none is None and isinstance(found, Hardware)
    path = tmp_path / "own.yaml"
    path.write_text(hardware_as_yaml(found))
    assert load_hardware(str(path)) == found
    for name in (*FITTED, "peak_flops", "memory_bytes_per_second", "latency", "inside_bytes_per_second"):
        assert "measured on" in found.sources[name] and getattr(found, name) > 0
    assert "placeholder" in found.sources["checkpoint_bytes_per_second"]
    assert found.name == f"cpu-{gethostname()}"
    for off, said in ((BAD_FIT - 0.01, False), (BAD_FIT + 0.01, True)):
        assert ("A BAD FIT" in _explained(found, 2, {*FITTED}, off).sources["products"]) is said
