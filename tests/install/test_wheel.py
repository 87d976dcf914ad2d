"""The wheel alone is enough: built, unpacked into an empty folder, used from another empty one without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
from project import ROOT

pytestmark = pytest.mark.slow  # about a minute
BUILD_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("megatron_eagle", "kernels", "examples", "slurm", "constraints")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what ``pip install`` puts into site-packages, and nothing else."""
    source = tmp_path_factory.mktemp("source")  # a copy: building writes into its folder
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    folder = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder), str(source)]
    done = subprocess.run(install, capture_output=True, text=True, cwd=source, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def installed(site: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run python with ``command`` in ``folder``: our code from ``site`` only, dependencies from this environment.

    -S leaves out .pth files, which would lead an editable install back to the checkout.
    """
    dependencies = sysconfig.get_paths()["purelib"]
    environment = {name: value for name, value in os.environ.items() if name != "PATH"}
    environment |= {"PYTHONPATH": f"{site}:{dependencies}", "PATH": "/nowhere", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-S", *command]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def answer(site: Path, folder: Path, *arguments: str) -> str:
    done = installed(site, folder, "-m", "megatron_eagle", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_of_the_checkout_is_used(site: Path, tmp_path: Path) -> None:
    lines = "import megatron_eagle, eagle_kernels; print(megatron_eagle.__file__); print(eagle_kernels.__file__)"
    found = installed(site, tmp_path, "-c", lines).stdout.split()
    assert found == [str(site / "megatron_eagle" / "__init__.py"), str(site / "eagle_kernels" / "__init__.py")]


def test_every_file_that_is_read_by_name_is_in_it(site: Path) -> None:
    def below(folder: Path) -> dict[str, bytes]:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    assert below(site / "megatron_eagle" / "recipes") == below(ROOT / "examples")
    assert below(site / "megatron_eagle" / "slurm") == below(ROOT / "slurm")
    shipped = {file for file in below(site / "megatron_eagle") if not file.endswith(".pyc")}
    written = {file for file in below(ROOT / "megatron_eagle") if not file.endswith(".pyc")}
    assert written <= shipped, "files of the package that the wheel lacks"


def test_help_recipe_and_plan(site: Path, tmp_path: Path) -> None:
    assert "verbs" in answer(site, tmp_path, "--help")
    assert "name: eagle2-9b" in answer(site, tmp_path, "recipe", "eagle2-9b")
    assert "stage1.5 on 256 GPUs" in answer(site, tmp_path, "plan", "eagle2-9b", "--gpus", "256", "--stage", "stage1.5")
    assert list(tmp_path.iterdir()) == []


def test_a_chain_can_be_looked_at(site: Path, tmp_path: Path) -> None:
    said = answer(site, tmp_path, "submit", "eagle2-9b", "--cluster", "h100", "--export", "out", "--dry-run")
    assert said.count("#!/bin/bash") == 4
    assert "### would submit stage2: 32 nodes, 256 processes, after stage1.5 has ended well" in said
    assert f"give a copy of {site / 'megatron_eagle' / 'slurm' / 'profiles' / 'h100.yaml'} as --cluster" in said
    assert list(tmp_path.iterdir()) == []


def test_the_demo_begins(site: Path, tmp_path: Path) -> None:
    assert "RECIPE" in answer(site, tmp_path, "demo", "--help")
    begin = """
        from dataclasses import replace
        from functools import partial
        from pathlib import Path
        from megatron_eagle.demo import run

        run.SETS = tuple(replace(part, samples=60) for part in run.SETS)
        run._command = partial(print, "command:")
        try:
            run.run_demo(Path("tiny"), (), Path("runs"), 2, 0.0)
        except Exception as error:
            print("then:", error)
    """
    done = installed(site, tmp_path, "-c", textwrap.dedent(begin))
    assert "command: train tiny --runs runs --processes 2 --stage stage1\n" in done.stdout, done.stderr
    assert {path.name for path in (tmp_path / "runs" / "demo" / "data").iterdir()} >= {"broad", "fine", "heldout"}
