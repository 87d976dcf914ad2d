"""docs/extending.md does what it says: its files are written into a copy of the repository, its commands run there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from project import ROOT

PAGE = ROOT / "docs" / "extending.md"
FOLDERS = ("megatron_eagle", "kernels", "examples", "slurm")
HEAD = re.compile(
    r"\*\*New\*\*: `(.+?)`(?:, (\d+) files)?\. \*\*Read first\*\*: (.+?); at most (\d+) lines\.", re.DOTALL
)


@dataclass(frozen=True)
class WalkThrough:
    """One section. new: the file or folder, and its files; files: path -> text; read: files, and lines at most."""

    title: str
    new: tuple[str, int]
    files: dict[str, str]
    read: tuple[tuple[str, ...], int]
    commands: tuple[str, ...]


def walk_throughs() -> list[WalkThrough]:
    found = []
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        head = HEAD.search(section)
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        files = {text.split("\n")[0].removeprefix("# "): text for kind, text in blocks if text.startswith("# ")}
        commands = tuple(line for kind, text in blocks if kind == "sh" for line in text.splitlines())
        assert head and len(files) + sum(kind == "sh" for kind, _ in blocks) == len(blocks), section[:60]
        read = tuple(re.findall(r"`(.+?)`", head[3]))
        found.append(
            WalkThrough(section.splitlines()[0], (head[1], int(head[2] or 1)), files, (read, int(head[4])), commands)
        )
    return found


WALKS = walk_throughs()
each = pytest.mark.parametrize("walk", WALKS, ids=[walk.title for walk in WALKS])


def test_the_page_has_all_four() -> None:
    assert [walk.title for walk in WALKS] == ["An encoder", "A packing rule", "A kernel", "A hardware profile"]


@each
def test_the_page_counts_right(walk: WalkThrough) -> None:
    place, count = walk.new
    assert len(walk.files) == count
    assert all(name == place or (place.endswith("/") and name.startswith(place)) for name in walk.files)
    assert not any((ROOT / name).exists() for name in (place, *walk.files)), "the example is there already"
    names, most = walk.read
    lines = sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in names)
    assert 0.8 * most <= lines <= most


@pytest.mark.slow
@each
def test_the_page_works(walk: WalkThrough, tmp_path: Path) -> None:
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder)  # with what was compiled of it
    for name, text in walk.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{tmp_path / 'kernels'}", "OMP_NUM_THREADS": "1"}
    assert walk.commands
    for command in walk.commands:
        program, *arguments = shlex.split(command)
        assert program == "python"
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
