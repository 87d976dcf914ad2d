"""The other stack - the other megatron-core and Python - continues what this one has trained, to the last bit.

Needs a second environment (``make test-stacks`` makes one and passes its Python on as ``--other-python``).
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

STAGES = {"first": 6, "second": 6}
HALF = 3


@pytest.fixture(scope="module")
def other_python(request: pytest.FixtureRequest) -> str:
    python = request.config.getoption("--other-python")
    if not python:
        pytest.skip("no second environment: make test-stacks makes one where there is a second Python")
    versions = [megatron_version(one) for one in (sys.executable, python)]
    assert len(set(versions)) == 2, f"both have megatron-core {versions[0]}"
    return str(python)


def megatron_version(python: str) -> str:
    line = "import importlib.metadata as m; print(m.version('megatron-core'))"
    return subprocess.run([python, "-c", line], capture_output=True, text=True, check=True).stdout.strip()


def train(python: str, recipe: Path, runs: Path, stage: str) -> None:
    """One stage in two processes, to the end of the recipe's."""
    line = [python, "-m", "megatron_eagle", "train", str(recipe), "--stage", stage, "--runs", str(runs)]
    done = subprocess.run([*line, "--processes", "2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a library speaks to users"


def steps(runs: Path) -> list[tuple[str, int, float, float, str]]:
    entries = map(json.loads, (runs / "small" / "metrics.jsonl").read_text().splitlines())
    return [(e["stage"], e["step"], e["loss"], e["grad_norm"], e["sample_digest"]) for e in entries]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [{"pp": 2}, {"tp": 2, "sequence_parallel": True}, pytest.param({}, marks=pytest.mark.long)], ids=str
)
def test_each_stack_continues_the_others_checkpoints(small_run, other_python, tmp_path, layout) -> None:
    """Stage ``first`` to its half in one stack and to its end in the other, ``second`` in the first one again."""
    recipe = small_run.write_recipe(tmp_path / "r.yaml", layout=layout)
    pythons = {"this": sys.executable, "other": other_python}
    runs = {}
    for name, python in pythons.items():
        runs[name] = tmp_path / name
        train(python, recipe, runs[name], "first")
        runs[f"half in {name}"] = tmp_path / f"half in {name}"
        shutil.copytree(runs[name], tmp_path / f"half in {name}")
        train(python, recipe, runs[name], "second")
    for begun, continued in ("this", "other"), ("other", "this"):
        half = runs[f"half in {begun}"]
        forget_the_second_half(half)
        train(pythons[continued], recipe, half, "first")
        train(pythons[begun], recipe, half, "second")
    expected = steps(runs["this"])
    trained = [(stage, step) for stage, last in STAGES.items() for step in range(1, last + 1)]
    assert [entry[:2] for entry in expected] == trained
    assert {name: steps(folder) for name, folder in runs.items()} == dict.fromkeys(runs, expected)


def forget_the_second_half(runs: Path) -> None:
    """As if the trainer had been killed behind step ``HALF``."""
    stage = runs / "small" / "checkpoints" / "first"
    for folder in stage.glob("step_*"):
        if int(folder.name.removeprefix("step_")) > HALF:
            shutil.rmtree(folder)
    (stage / "latest").write_text(f"step_{HALF:08}")
