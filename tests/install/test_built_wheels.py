"""What would be published works: both distributions built as ``python -m build`` does, by way of the source
distribution, installed with their dependencies into an empty environment, used from an empty folder.

``make test-wheels`` makes the environment and passes its Python on as ``--wheels-python``.
"""

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from project import ROOT, STACKS

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
VERSION = "0.1.0"
NOT_SHIPPED = (".ci/", ".github/")  # of the hosting, not of the project
# Each stage some steps long: all parts of the demo, and a model that has learned nothing.
SHORT_DEMO = ("stages.stage1.steps=4", "stages.stage1.5.steps=4", "stages.stage2.steps=4")


def run(folder: Path, *command: str) -> str:
    """The output of a command in ``folder``, with nothing of this checkout or this environment on its way."""
    gone = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in gone} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's files: building writes into its folder."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: which files belong to the repository is not known")
    folder = tmp_path_factory.mktemp("source")
    for name in run(ROOT, "git", "ls-files", "-z").rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(tracked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source distribution and a wheel made from it, of both."""
    out = tmp_path_factory.mktemp("dist")
    hook = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    for source in (tracked, tracked / "kernels"):
        run(source, sys.executable, "-c", hook)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "."]
    for source in sorted(out.glob("*.tar.gz")):
        run(out, *wheel, source.name)
    return out


@pytest.fixture(scope="module")
def command(request: pytest.FixtureRequest, built: Path) -> str:
    """``megatron-eagle`` of the environment, into which both wheels were installed."""
    python = request.config.getoption("--wheels-python")
    if not python:
        pytest.skip("no empty environment: make test-wheels makes one")
    python = str(Path(python).absolute())
    older = run(built, python, "-c", "import sys; print(sys.version_info < (3, 12))").strip() == "True"
    pinned = ROOT / "constraints" / f"megatron-{STACKS[0] if older else STACKS[1]}.txt"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", str(pinned)]
    run(built, *install, *sorted(file.name for file in built.glob("*.whl")))
    run(built, python, "-m", "pip", "check")
    return str(Path(python).with_name("megatron-eagle"))


def files_of_wheel(built: Path, name: str) -> dict[str, bytes]:
    with zipfile.ZipFile(built / f"{name}-{VERSION}-py3-none-any.whl") as wheel:
        return {one: wheel.read(one) for one in wheel.namelist()}


def metadata(built: Path, name: str) -> Message:
    return email.message_from_bytes(files_of_wheel(built, name)[f"{name}-{VERSION}.dist-info/METADATA"])


def test_the_source_distributions_hold_all_of_the_repository(built: Path, tracked: Path) -> None:
    for name, source in (("megatron_eagle", tracked), ("eagle_kernels", tracked / "kernels")):
        with tarfile.open(built / f"{name}-{VERSION}.tar.gz") as archive:
            shipped = {one.name.partition("/")[2] for one in archive.getmembers() if one.isfile()}
        files = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
        assert {
            file for file in files - shipped if ".egg-info" not in file and not file.startswith(NOT_SHIPPED)
        } == set()
        assert not any(file.endswith((".pyc", ".whl")) for file in shipped)


def test_both_wheels_hold_the_same_kernels(built: Path) -> None:
    """So it does no harm to have both."""
    kernels, trainer = (
        {name: data for name, data in files_of_wheel(built, dist).items() if name.startswith("eagle_kernels/")}
        for dist in ("eagle_kernels", "megatron_eagle")
    )
    assert len(kernels) > 25 and kernels == trainer


@pytest.mark.parametrize("name", ["megatron_eagle", "eagle_kernels"])
def test_an_index_would_take_it(built: Path, name: str) -> None:
    about = metadata(built, name)
    assert about["License-Expression"] == "Apache-2.0"
    assert not [one for one in about.get_all("Classifier") if one.startswith("License ::")]  # refused beside it
    assert about["Description-Content-Type"] == "text/markdown" and about.get_payload()
    assert 0 < len(about["Summary"]) < 512
    assert not [one for one in about.get_all("Requires-Dist") if " @ " in one]  # indexes take no addresses
    assert any(file.endswith("/licenses/LICENSE") for file in files_of_wheel(built, name))


def test_a_plan_and_a_key_from_an_empty_folder(command: str, tmp_path: Path) -> None:
    said = run(tmp_path, command, "plan", "eagle2-9b")
    assert "stage1 on 128 GPUs" in said and "stage2 on 256 GPUs" in said
    assert "stages" in run(tmp_path, command, "recipe", "eagle2-9b", "--explain", "stages")
    assert list(tmp_path.iterdir()) == []


def test_the_kernels_can_be_checked(command: str, tmp_path: Path) -> None:
    python = str(Path(command).with_name("python"))
    assert "--tier" in run(tmp_path, python, "-m", "eagle_kernels.check", "--help")


def test_the_demo_to_its_report(command: str, tmp_path: Path) -> None:
    said = run(tmp_path, command, "demo", *SHORT_DEMO)
    assert "of the held-out questions right" in said
    done = tmp_path / "runs" / "demo"
    assert (done / "report.html").is_file()
    assert [stage["name"] for stage in json.loads((done / "summary.json").read_text())["stages"]] == [
        "stage1",
        "stage1.5",
        "stage2",
    ]
    assert (done / "export" / "config.json").is_file()
