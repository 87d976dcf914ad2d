"""The repository stays small and readable: no large binaries among its files."""

import shutil
import subprocess
from pathlib import Path

import pytest
from project import ROOT

LARGEST_BINARY = 200_000  # bytes


def large_binaries(folder: Path, names: list[str]) -> list[str]:
    """Those of ``names`` that are larger than allowed and no text (a zero byte, or not UTF-8, as git decides it)."""
    found = []
    for name in names:
        path = folder / name
        if not path.is_file() or path.stat().st_size <= LARGEST_BINARY:
            continue
        head = path.read_bytes()
        try:
            binary = "\0" in head.decode("utf-8")
        except UnicodeDecodeError:
            binary = True
        if binary:
            found.append(f"{name}: {len(head)} bytes")
    return found


def test_no_large_binary_is_committed() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git checkout: which files belong to the repository is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    assert large_binaries(ROOT, listed.decode().rstrip("\0").split("\0")) == []


def test_what_is_a_large_binary(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a line\n" * LARGEST_BINARY)
    (tmp_path / "small").write_bytes(b"\0" * LARGEST_BINARY)
    (tmp_path / "wheel").write_bytes(b"PK\0" * LARGEST_BINARY)
    assert large_binaries(tmp_path, ["text", "small", "wheel", "gone"]) == [f"wheel: {3 * LARGEST_BINARY} bytes"]
