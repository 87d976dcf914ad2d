"""A bare GPU image with the carried wheels is enough: it trains the embedded recipe and goes through a GPU day.

The image is an environment with torch, triton, transformers, numpy, each as old as is taken, and what they need
(``make test-bare`` makes one and passes its Python on as ``--bare-python``). tools/offline_wheels.py is given the list
of its packages; what it fetches is installed without an index.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

from megatron_eagle.gpu_day.part import part_names

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]
# Where no videos are and no Parquet is (docs/gpu_day.md).
LEFT_OUT = ("av", "pyarrow")
MINUTES = "30"  # a part; a GPU's limit is 9, a machine with two cores may be busy


@pytest.fixture(scope="module")
def image(request: pytest.FixtureRequest) -> str:
    python = request.config.getoption("--bare-python")
    if not python:
        pytest.skip("no environment of a bare GPU image: make test-bare makes one")
    return str(Path(python).absolute())  # commands run in other folders


@pytest.fixture(scope="module")
def carried(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the carried wheels installed, and nothing else."""
    folder = tmp_path_factory.mktemp("machine")
    pip = [image, "-m", "pip", "--disable-pip-version-check"]
    (folder / "machine.txt").write_text(run([*pip, "list", "--format=freeze"], folder))
    leave_out = [word for name in LEFT_OUT for word in ("--leave-out", name)]
    tool = [sys.executable, str(ROOT / "tools" / "offline_wheels.py"), str(folder / "machine.txt"), "--python", "3.12"]
    print(run([*tool, *leave_out, "--download", str(folder / "wheels")], folder))
    wheels = sorted(map(str, (folder / "wheels").glob("*.whl")))
    own = ["--no-deps", "--no-index", "--find-links", str(folder / "wheels"), "--target", str(folder / "site")]
    run([*pip, "install", "--quiet", *own, *wheels], folder)
    return folder / "site"


def run(command: list[str], folder: Path, *paths: Path) -> str:
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:] or done.stdout[-3000:]
    return done.stdout


def test_it_goes_through_a_day_at_toy_size(image: str, carried: Path, tmp_path: Path) -> None:
    """Every part; ``demo`` is the embedded recipe through its commands, from its data set to its answers."""
    day = [image, "-m", "megatron_eagle", "gpu-day", "day", "--toy", "--minutes", MINUTES]
    print(run(day, tmp_path, carried, ROOT, ROOT / "kernels"))
    (report,) = (tmp_path / "day").glob("*/report.json")
    found = {one["part"]: one for one in json.loads(report.read_text())["parts"]}
    assert found.keys() == set(part_names())
    assert {name: (one["ending"], one["result"]["wrong"]) for name, one in found.items()} == dict.fromkeys(
        part_names(), ("done", [])
    )
    has = found["demo"]["machine"]["versions"]
    assert has["torch"].startswith("2.11.") and has["triton"].startswith("3.6.")
