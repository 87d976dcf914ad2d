"""How a shard is known again without reading it, so that what was measured of it stays when others join it.

A shard that was built here is known by the checksums that the build kept of every byte of it. One that another program
made is known by its size and the time of its last change, as ``make`` and ``rsync`` know files. If it was changed in
spite of that, reading it says so: every sample is held against what was measured.
"""

import zlib
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.data.storage.checksums import open_checksums
from megatron_eagle.data.storage.location import Location
from megatron_eagle.data.storage.shards import shard_counts
from megatron_eagle.errors import UserError


@dataclass(frozen=True)
class ShardStamp:
    """name: of the file; promised: samples by the data set's index; size: bytes; content: of its checksums, or when it
    was last changed."""

    name: str
    promised: int
    size: int
    content: str


@dataclass(frozen=True)
class MeasuredShard:
    """A shard and the samples that were found in it."""

    stamp: ShardStamp
    samples: int

    def to_json(self) -> list[Any]:
        return [*astuple(self.stamp), self.samples]

    @staticmethod
    def from_json(values: list[Any]) -> "MeasuredShard":
        return MeasuredShard(ShardStamp(*values[:-1]), values[-1])


def stamp_shards(folder: Location) -> list[ShardStamp]:
    """Of all shards of a data set, in their order. UserError if it is none or a shard is not there."""
    counts = shard_counts(folder)
    if not isinstance(folder, Path):  # nothing that is measured is kept there
        return [ShardStamp(name, count, 0, "") for name, count in counts.items()]
    try:
        checksums = open_checksums(folder)
    except UserError:  # damaged: as if there were none
        checksums = {}
    stamps = []
    for name, count in counts.items():
        try:
            found = (folder / name).stat()
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be read: {error.strerror}") from error
        content = f"changed {found.st_mtime_ns}"
        if name in checksums:
            content = f"crc32 {zlib.crc32(checksums[name].read().tobytes())}"
        stamps.append(ShardStamp(name, count, found.st_size, content))
    return stamps
