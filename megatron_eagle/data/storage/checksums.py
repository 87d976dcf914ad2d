"""What every byte of a shard was when it was written: how long each member of the tar is, and its CRC-32.

A disk or a copy that goes wrong changes bytes without a word, and a JPEG with a wrong byte still decodes to something.
So a build keeps 8 bytes for each member, 16 for a sample with one image: its blocks of 512 (header, content and
padding, which lie in a row without a gap) and the CRC-32 of them. That finds every single changed byte and every burst
of up to 32 bits, and all but one in four billion of other damage; it is no protection against someone who means to.

    .eagle-meta/checksums-1/members.bin     of all shards, behind one another: MEMBER, little-endian
    .eagle-meta/checksums-1/shards.json     {"shards": {name: members}, "crc32": of members.bin}
"""

import itertools
import json
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_eagle.errors import UserError

CHECKSUMS_FOLDER = ".eagle-meta/checksums-1"
MEMBERS_FILE = "members.bin"
SHARDS_FILE = "shards.json"
BLOCK = 512
MEMBER = np.dtype([("blocks", "<u4"), ("crc32", "<u4")])
CHUNK = 1 << 20  # bytes read at a time

Members = NDArray[Any]


class SummedWriter:
    """A file to write a tar into; ``end_member`` after each member keeps what was written since the last one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._members: list[tuple[int, int]] = []
        self._begin = self._crc = 0

    def write(self, data: bytes) -> int:
        """As of a file."""
        self._crc = zlib.crc32(data, self._crc)
        return self._file.write(data)

    def tell(self) -> int:
        """As of a file."""
        return self._file.tell()

    def end_member(self) -> None:
        """Says that a member has been written, with its padding."""
        size = self.tell() - self._begin
        if size % BLOCK:
            raise ValueError(f"a member of a tar file is whole blocks of {BLOCK} bytes, not {size} bytes")
        self._members.append((size // BLOCK, self._crc))
        self._begin, self._crc = self.tell(), 0

    def members(self) -> bytes:
        """MEMBER of each, as in MEMBERS_FILE."""
        return np.array(self._members, dtype=MEMBER).tobytes()


def write_checksums(folder: Path, shards: Sequence[tuple[str, Path]]) -> None:
    """Puts the checksums of all shards, (name, file of its ``SummedWriter.members``), together."""
    final = folder / CHECKSUMS_FOLDER
    final.mkdir(parents=True, exist_ok=True)
    with open(final / MEMBERS_FILE, "wb") as together:
        for _, file in shards:
            with open(file, "rb") as own:
                shutil.copyfileobj(own, together)
    counts = {name: file.stat().st_size // MEMBER.itemsize for name, file in shards}
    description = json.dumps({"shards": counts, "crc32": _crc_of(final / MEMBERS_FILE)})
    (final / SHARDS_FILE).write_text(description, encoding="utf-8")


@dataclass(frozen=True)
class ShardChecksums:
    """Where those of a shard are kept: ``count`` of ``file``, from number ``first`` on."""

    file: Path
    first: int
    count: int

    def read(self) -> Members:
        """MEMBER [count]."""
        return np.fromfile(self.file, dtype=MEMBER, offset=self.first * MEMBER.itemsize, count=self.count)


def open_checksums(folder: Path) -> dict[str, ShardChecksums]:
    """The checksums of each shard by its name, empty if none were kept; UserError if they are damaged themselves."""
    kept = folder / CHECKSUMS_FOLDER
    if not kept.exists():
        return {}
    try:
        description = json.loads((kept / SHARDS_FILE).read_text(encoding="utf-8"))
        counts = {str(name): int(count) for name, count in description["shards"].items()}
        found = _crc_of(kept / MEMBERS_FILE)
        size = (kept / MEMBERS_FILE).stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{kept}: cannot be read: {' '.join(str(error).split())}") from error
    if found != description.get("crc32") or size != sum(counts.values()) * MEMBER.itemsize:
        raise UserError(f"{kept}: {size} bytes, which are not those that were written")
    ends = itertools.accumulate(counts.values())
    return {
        name: ShardChecksums(kept / MEMBERS_FILE, end - count, count)
        for (name, count), end in zip(counts.items(), ends, strict=True)
    }


def _crc_of(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
