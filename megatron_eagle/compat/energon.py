"""Energon's machinery behind its documented classes: writing an index, blending, packing, random access.

Leaned on, in ``megatron.energon``:

- ``flavors.webdataset.prepare.WebdatasetPreparator.prepare_dataset``: the public command ``energon prepare`` asks
  questions;
- ``metadataset.metadataset_v2.MetadatasetBlend``: otherwise a blend is a YAML file, read from a path;
- ``PackingDataset._fill_reading_buffer``: the one place from which Energon's progress bar can be kept off. A saved
  position holds the names of the classes that read, so ours keeps its own;
- the attribute ``pin_memory`` of a loader, which cannot be given when it is made;
- ``cache.file_store.WebdatasetFileStore`` with ``sqlite_reader.get_sample_part`` and ``tar_filepaths``: where a file
  of a sample lies in a shard. Energon reads whole files; a video is too large for that.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron.energon import PackingDataset, SavableDataLoader, SavableDataset, WorkerConfig, get_savable_loader
from megatron.energon.cache.file_store import WebdatasetFileStore
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
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


class ShardFiles:
    """The files of a data set's samples, by random access through its index. KeyError for a file that has no entry."""

    def __init__(self, path: Path | EPath) -> None:
        self._store = WebdatasetFileStore(EPath(path))

    def read(self, key: str, ending: str) -> bytes:
        """The whole file ``ending`` of the sample ``key``."""
        data, _ = self._store[f"{key}.{ending}"]
        return bytes(data)

    def locate(self, key: str, ending: str) -> tuple[EPath, int, int]:
        """Where that file lies: its shard, the first byte in it, and how many they are."""
        entry = self._store.sqlite_reader.get_sample_part(key, ending)
        return self._store.tar_filepaths[entry.tar_file_id], entry.raw_byte_offset, entry.raw_byte_size
