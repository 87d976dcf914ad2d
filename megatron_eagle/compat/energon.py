"""Energon's machinery behind its documented classes: writing an index, blending, packing, random access.

Leaned on, in ``megatron.energon``:

- ``flavors.webdataset.prepare.WebdatasetPreparator.prepare_dataset``: the public command ``energon prepare`` asks
  questions;
- ``metadataset.metadataset_v2.MetadatasetBlend``: otherwise a blend is a YAML file, read from a path;
- ``PackingDataset._fill_reading_buffer``: the one place from which Energon's progress bar can be kept off. A saved
  position holds the names of the classes that read, so ours keeps its own;
- the attribute ``pin_memory`` of a loader, which cannot be given when it is made;
- the tables ``samples`` and ``sample_parts`` of ``.nv-meta/index.sqlite``, whose tar files are numbered in the order of
  ``.info.json``: by them planned packs are read, at random. Energon's own ``WebdatasetFileStore`` opens the shard anew
  for every file of a sample, which downloads it as a whole from an object store;
- these and ``SHARD.idx``, int64 where each sample begins and the last one ends: what a check of all bytes holds against
  the shards. Energon's own readers believe them, and end in an error whose words are known here;
- ``local_copy.ensure_local_copy``: one copy of a remote index for all processes of a machine.
"""

import itertools
import re
import sqlite3
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from megatron.energon import PackingDataset, SavableDataLoader, SavableDataset, WorkerConfig, get_savable_loader
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
from megatron.energon.local_copy import ensure_local_copy
from megatron.energon.metadataset.metadataset_v2 import BlendDatasetReference, MetadatasetBlend

_From = TypeVar("_From")
_Encoded = TypeVar("_Encoded")
_To = TypeVar("_To")


def prepare_index(folder: Path, shards: list[str]) -> None:
    """Write Energon's index of ``shards`` into ``folder``, all in the split ``train``; up to four processes count."""
    WebdatasetPreparator.prepare_dataset(
        folder, shards, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=min(4, len(shards))
    )


def load_blend(
    sources: Sequence[tuple[str, float]], workers: WorkerConfig, *, max_samples_per_sequence: int | None
) -> dict[str, Any]:
    """The split ``train`` of ``sources`` (path, weight), not decoded, for ``TaskEncoder.build_train_datasets``."""
    blend = MetadatasetBlend(blend=[BlendDatasetReference(path=EPath(path), weight=weight) for path, weight in sources])
    blend.post_initialize(EPath("."))  # where relative paths would start; an EPath has none left
    loaded = blend.get_datasets(
        training=True,
        split_part="train",
        worker_config=workers,
        max_samples_per_sequence=max_samples_per_sequence,
        decoder=None,
    )
    return {"datasets": loaded.datasets, "blend_mode": loaded.blend_mode}


class _QuietPackingDataset(PackingDataset[_From, _Encoded, _To]):
    """Energon's, without the progress bar that it draws on every reader of every rank while the first buffer fills."""

    def _fill_reading_buffer(self, source_iter: Any, log_progress: bool = False) -> bool:
        return super()._fill_reading_buffer(source_iter, log_progress=False)


def pack_quietly(samples: SavableDataset[_From], **options: Any) -> SavableDataset[Any]:
    """``PackingDataset`` with ``options``, silent."""
    return _QuietPackingDataset(samples, **options)


def open_loader(samples: SavableDataset[_To], *, pin_memory: bool, **options: Any) -> SavableDataLoader[_To]:
    """``get_savable_loader`` with ``options``, which does not pin memory unless it is told to: that needs a GPU."""
    loader = get_savable_loader(samples, **options)
    loader.pin_memory = pin_memory
    return loader


@dataclass(frozen=True)
class IndexedSample:
    """A sample of a shard as Energon's index has it; files: (name ending, first byte of its content, bytes)."""

    key: str
    begin: int
    end: int
    files: tuple[tuple[str, int, int], ...]


def copy_once(file: EPath) -> Path:
    """A local copy of a remote file, the same for all processes of this machine; as of Energon, of any length."""
    return ensure_local_copy(file).local_path()


class ShardIndex:
    """What Energon's index, ``index.sqlite``, says of the samples of each shard; closed as a context, or by ``close``.
    Every call may raise ``sqlite3.Error``, if the index cannot be read. It holds one file open."""

    def __init__(self, file: Path) -> None:
        # A disk that is read only has no place for sqlite's locks.
        self._database = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro&immutable=1", uri=True)

    def __enter__(self) -> "ShardIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        self._database.close()

    def samples(self, shard: int) -> list[IndexedSample]:
        """Those of shard number ``shard``, in order."""
        rows = self._database.execute(
            "SELECT s.sample_key, s.byte_offset, s.byte_size, p.part_name, p.content_byte_offset, p.content_byte_size "
            "FROM samples AS s JOIN sample_parts AS p "
            "ON p.tar_file_id = s.tar_file_id AND p.sample_index = s.sample_index "
            "WHERE s.tar_file_id = ? ORDER BY s.sample_index, p.content_byte_offset",
            (shard,),
        )
        return [
            IndexedSample(key, begin, begin + size, tuple((name, first, bytes_) for *_, name, first, bytes_ in own))
            for (key, begin, size), own in itertools.groupby(rows, key=lambda row: row[:3])
        ]

    def files(self, key: str) -> tuple[int, dict[str, tuple[int, int]]]:
        """Number of the shard that holds the sample ``key``, and its files in their order: name ending -> (first byte
        in the shard, bytes). KeyError if there is no such sample."""
        rows = self._database.execute(
            "SELECT p.tar_file_id, p.part_name, p.content_byte_offset, p.content_byte_size "
            "FROM samples AS s JOIN sample_parts AS p "
            "ON p.tar_file_id = s.tar_file_id AND p.sample_index = s.sample_index "
            "WHERE s.sample_key = ? ORDER BY p.content_byte_offset",
            (key,),
        ).fetchall()
        if not rows:
            raise KeyError(key)
        return int(rows[0][0]), {ending: (begin, size) for _, ending, begin, size in rows}

    def count(self) -> int:
        """Samples of all shards."""
        return int(self._database.execute("SELECT COUNT(*) FROM samples").fetchone()[0])

    def shard_of(self, key: str) -> int | None:
        """Number of the shard that holds a sample."""
        row = self._database.execute("SELECT tar_file_id FROM samples WHERE sample_key = ?", (key,)).fetchone()
        return None if row is None else int(row[0])


def sample_borders(shard: Path) -> list[int]:
    """Where each sample of a shard begins and the last one ends, by the file beside it; raises OSError."""
    data = Path(f"{shard}.idx").read_bytes()
    whole = len(data) // 8 * 8
    return [int(border) for border in np.frombuffer(data[:whole], dtype="<i8")] + [-1] * (whole != len(data))


def damaged_shard(error: ValueError | OSError | tarfile.TarError) -> str | None:
    """What Energon's reader, here or in another process, says of a damaged shard or index, in a line; None if it is
    another error."""
    if isinstance(error, tarfile.TarError):
        return str(error).strip().splitlines()[-1]
    found = re.search(
        r"(Unexpected end of tar file|Inconsistent sample base name): .*|No such file .*\.tar'", str(error)
    )
    return found[0] if found else None
