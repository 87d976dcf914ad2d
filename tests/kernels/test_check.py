"""The checks of the checks: what they refuse, and the one command that a kernel's reader runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eagle_kernels import check
from eagle_kernels.checking import tiers
from eagle_kernels.checking.ahead_of_time import Build, build, complaints
from eagle_kernels.checking.registry import KERNELS, Check, Roofline, entry
from eagle_kernels.checking.tiers import FAILED, PASSED, Row
from eagle_kernels.device import INTERPRETED

compiles = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")
FITS = Build("x", 90, registers=128, spilled_bytes=0, shared_bytes=232_448, wgmma=4, mma=0, tcgen05=0, seconds=0.0)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(("tile_prepare", "pixel_shuffle_concat"), id="some", marks=pytest.mark.slow),
        pytest.param(tuple(KERNELS), id="all", marks=pytest.mark.long),
    ],
)
def test_kernels_pass_every_tier_this_machine_has(tmp_path, capsys, kernels: tuple[str, ...]) -> None:
    report = tmp_path / "check.json"
    code = check.main(["--json", str(report), *(f"--kernel={kernel}" for kernel in kernels)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    rows = json.loads(report.read_text())
    seen = {(row["kernel"], row["tier"]) for row in rows}
    assert seen >= {(kernel, tier) for kernel in kernels for tier in check.CPU_TIERS}
    architectures = {row["case"].split()[-1] for row in rows if row["tier"] == "compile"}
    assert architectures == {"sm_80", "sm_90", "sm_100"}
    assert [row["detail"] for row in rows if row["tier"] == "gpu"] == ["not asked for (--gpu)"]


def compilation(**changes):
    return replace(entry("tile_prepare").compilations()[0], **changes)


@pytest.mark.parametrize(
    ("built", "said"),
    [
        ({"spilled_bytes": 8}, "spills 8 B"),
        ({"shared_bytes": 232_449}, "232449 B > 232448 B"),
        ({"architecture": 80, "shared_bytes": 166_913}, "166913 B > 166912 B"),
        ({"wgmma": 0}, "no wgmma"),
    ],
)
def test_budget(built, said):
    wanted = compilation(num_warps=8, needs_wgmma=True)
    assert complaints(wanted, FITS) == []
    assert said in complaints(wanted, replace(FITS, **built))[0]


def test_a_block_must_fit_into_the_register_file():
    assert "255 registers x 512 threads" in complaints(compilation(num_warps=16), replace(FITS, registers=255))[0]


@compiles
def test_spills_of_a_real_build_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = [c for c in entry("pixel_shuffle_concat").compilations() if not c.chosen]
    assert "spills" in complaints(found[0], build(found[0], 90))[0]


def test_a_compilation_describes_exactly_the_arguments():
    good = compilation()
    with pytest.raises(ValueError, match="siglip"):
        replace(good, signature={k: v for k, v in good.signature.items() if k != "siglip"})
    with pytest.raises(ValueError, match="divisible_by_16"):
        replace(good, divisible_by_16=("nothing",))


@pytest.mark.parametrize(("error", "verdict"), [(0.5, PASSED), (1.5, FAILED), (float("nan"), FAILED)])
def test_errors_are_held_to_the_tolerance(error, verdict):
    row = tiers._compared("tile_prepare", "gpu", Check("made up", lambda device: error, 1.0), torch.device("cpu"))
    assert row.verdict == verdict


def test_a_check_that_raises_is_a_failure_with_its_reason():
    row = tiers._compared("tile_prepare", "gpu", Check("made up", lambda device: 1 / 0, 1.0), torch.device("cpu"))
    assert row.verdict == FAILED and "ZeroDivisionError" in row.detail


def test_a_tier_whose_process_dies_is_a_failure():
    rows = list(tiers.run("roofline", ["no_such_kernel"]))
    assert [row.verdict for row in rows] == [FAILED]
    assert "there is no kernel no_such_kernel" in rows[0].detail


def test_exit_code_and_table(monkeypatch, capsys):
    bad = Row("tile_prepare", "roofline", "made up", FAILED, error=2.0, tolerance=1.0, registers=7, detail="too much")
    monkeypatch.setattr(check, "run", lambda tier, kernels: iter([bad]))
    assert check.main(["--tier", "roofline"]) == 1
    header, line = capsys.readouterr().out.splitlines()[:2]
    assert header.split()[:3] == ["kernel", "tier", "case"]
    assert line.split() == ["tile_prepare", "roofline", "made", "up", "2.0e+00", "1.0e+00", "7", "FAIL", "too", "much"]


def test_without_a_gpu_the_tier_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = tiers.gpu(["tile_prepare"])
    assert row.verdict == tiers.SKIPPED and "no CUDA device" in row.detail


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    assert Roofline(3_350_000_000, 0).floor_seconds() == pytest.approx(1e-3)
    assert Roofline(1, 989_000_000_000).floor_seconds() == pytest.approx(1e-3)


def test_bfloat16_is_refused_where_the_interpreter_is_not_corrected():
    program = (
        "import torch; from eagle_kernels.pixel_shuffle_concat import pixel_shuffle_concat as kernel; "
        "kernel(torch.zeros(1, 4, 2, dtype=torch.bfloat16), grid=(2, 2))"
    )
    packages = str(Path(check.__file__).resolve().parents[1])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": packages}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert "correct_bfloat16() once first" in done.stderr
