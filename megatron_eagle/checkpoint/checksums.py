"""Checksums of a checkpoint's files: a flipped byte, a missing or a truncated shard is found before it is loaded.

CRC-32, because it runs at several gigabytes a second and damage is not an adversary; conversions, whose results travel,
have sha256 in their proof. At saving each process measures the files it has written, at loading they are shared out.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_eagle.errors import Damaged

CHECKSUMS = "checksums.json"
_BLOCK = 1 << 22


def crc32(file: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with file.open("rb") as handle:
        while block := handle.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def measure(files: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of every file, by name."""
    return {file.name: {"bytes": file.stat().st_size, "crc32": crc32(file)} for file in files}


def write(folder: Path, entries: Mapping[str, Mapping[str, int]]) -> None:
    """Write what ``measure`` found."""
    (folder / CHECKSUMS).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def verify(folder: Path) -> None:
    """Raise, in every process, a Damaged that names what is damaged; all processes call this together.

    A checkpoint without checksums (an older one, or one that is being put together by hand) passes.
    """
    rank, size = rank_and_size()
    found = [line for part in gather(damage(folder, rank, size)) for line in part]
    if found:
        what = f"{folder} is damaged: {'; '.join(sorted(set(found)))}"
        advice = "'train' or 'submit' of its recipe, given --fallback, continues from the newest checkpoint that is not"
        raise Damaged(f"{what}. {advice}", what, str(folder))


def damage(folder: Path, rank: int = 0, size: int = 1) -> list[str]:
    """What is wrong with this process's share of the files."""
    try:
        entries = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        recorded = [(str(name), int(entry["bytes"]), int(entry["crc32"])) for name, entry in sorted(entries.items())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{CHECKSUMS} cannot be read ({error})"]
    lines = (_damage_of(folder / name, length, value) for name, length, value in recorded[rank::size])
    return [line for line in lines if line]


def _damage_of(file: Path, length: int, value: int) -> str | None:
    try:
        found = file.stat().st_size
        if found != length:
            return f"{file.name} has {found} bytes, {length} were written"
        return None if crc32(file) == value else f"{file.name} has other bytes than were written"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"


def rank_and_size() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) outside a run."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(ours: Any) -> list[Any]:
    """Every process's value, in every process."""
    if not dist.is_initialized():
        return [ours]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, ours)
    return parts
