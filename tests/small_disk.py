"""A disk that a test can fill: a file system of its own in memory, mounted for the time of a test."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """An empty file system at ``folder``, which is made; the test is skipped where this user may not mount."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    made = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"a disk that can be filled needs the right to mount: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def small_quota(folder: Path, megabytes: int) -> Iterator[Path]:
    """A folder with a quota in a file system that has room: writes beyond it get EDQUOT, as on a cluster's home.

    Btrfs, whose quotas hold for root, too; skipped without its tools or the right to mount.
    """
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("a quota needs mkfs.btrfs (Debian: btrfs-progs)")
    image, limited = folder.with_suffix(".img"), folder / "limited"
    with image.open("wb") as file:
        file.truncate(128 << 20)
    folder.mkdir()
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True, capture_output=True)
    made = subprocess.run(["mount", "-o", "loop", str(image), str(folder)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"a quota needs the right to mount a file: {made.stderr.strip()}")
    try:
        for words in (
            ("quota", "enable", str(folder)),
            ("subvolume", "create", str(limited)),
            ("qgroup", "limit", f"{megabytes}M", str(limited)),
        ):
            subprocess.run(["btrfs", *words], check=True, capture_output=True)
        yield limited
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
