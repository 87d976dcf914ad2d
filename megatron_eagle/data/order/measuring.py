"""Measuring a data set, shard by shard: what ``sample_index.py`` keeps of it is made here.

A shard is read once, and what is found is kept in a file of its own until all shards are there and are put together:
so measuring that was killed goes on where it was, and many processes can share it (``build/measure.py``). The result is
the same bytes for any number of them. When shards join a data set, or leave it, only the new ones are read; what was
measured of the others is taken from what was kept before (``shard_stamps.py``).

    .eagle-meta/.measured/samples-HASH.npz    of one shard, until all are there: its part of the index
    .eagle-meta/.measured/text-HASH.npy       tokens of text of its samples
    .eagle-meta/text-HASH.npy                 of all shards, for a tokenizer and system text
    .eagle-meta/text-HASH.json                which shards those are
"""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_eagle.data.order.sample_index import (
    INDEX_FOLDER,
    Ints,
    SampleIndex,
    arrays_of,
    description_of,
    index_of,
    load_earlier,
    load_index,
    save_index,
)
from megatron_eagle.data.order.scan import ScannedSample, assemble_index, count_text, scan_entry
from megatron_eagle.data.order.shard_stamps import MeasuredShard, ShardStamp, stamp_shards
from megatron_eagle.data.sample.chatml import TEXT_FORMAT
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.data.storage.location import Location, load_array, locate_dataset, read_text
from megatron_eagle.data.storage.shards import dataset_identity, iterate_entries
from megatron_eagle.data.storage.whole_file import written_whole

PARTS_FOLDER = f"{INDEX_FOLDER}/.measured"

Found = TypeVar("Found")


@dataclass(frozen=True)
class TextOf:
    """What tokens of text are counted with."""

    tokenizer: Tokenizer
    system: str

    def hash(self, *of: Any) -> str:
        """Names the counts of what ``of`` says, a data set or a shard."""
        return _hash(*of, self.tokenizer.fingerprint, self.system, TEXT_FORMAT)


@dataclass(frozen=True)
class ShardTask:
    """A shard of the data set in ``folder`` to be measured: its part of the index, if ``index``, and of the text."""

    folder: Location
    stamp: ShardStamp
    index: bool
    text: TextOf | None


def open_sample_index(path: Location | str) -> SampleIndex:
    """The index of a data set; it is made (and kept, where the folder can be written) if there is none yet.

    Raises UserError if ``path`` is no prepared data set or a shard cannot be read.
    """
    folder, identity = locate_dataset(path), dataset_identity(path)
    found = load_index(folder, identity)
    if found is not None:
        return found
    stamps = stamp_shards(folder)
    earlier = load_earlier(folder)
    old, known = earlier or (None, [])

    def new(stamp: ShardStamp) -> SampleIndex:
        measured, _ = measure_shard(ShardTask(folder, stamp, True, None))
        assert measured is not None
        return measured

    parts = _of_shards(stamps, known, lambda begin, end: old.part(begin, end), new)  # type: ignore[union-attr]
    made = SampleIndex.joined(folder, identity, list(parts.values()))
    shards = [MeasuredShard(stamp, len(part)) for stamp, part in parts.items()]
    with contextlib.suppress(OSError):  # a read-only data set: this process keeps it in memory
        save_index(made, shards)
    kept = load_index(folder, identity)
    if kept is not None:
        _forget(folder, [_index_part(folder, stamp) for stamp in stamps])
    return kept or made


def text_tokens(sample_index: SampleIndex, tokenizer: Tokenizer, system: str) -> Ints:
    """int32 [n]: tokens of each sample without tiles and frames and their words; BROKEN_TOKENS if it is broken.

    Counted once for a tokenizer and system text, and kept beside the shards.
    """
    folder, text = sample_index.path, TextOf(tokenizer, system)
    file = _text_file(folder, sample_index.identity, text)
    with contextlib.suppress(OSError, ValueError):
        counted = load_array(file)
        if len(counted) == len(sample_index):
            return counted
    stamps = stamp_shards(folder)
    old, known = _earlier_text(folder, text)

    def new(stamp: ShardStamp) -> Ints:
        _, counts = measure_shard(ShardTask(folder, stamp, False, text))
        assert counts is not None
        return counts

    parts = _of_shards(stamps, known, lambda begin, end: old[begin:end], new)
    counts = np.concatenate([np.zeros(0, np.int32), *parts.values()])
    shards = [MeasuredShard(stamp, len(part)).to_json() for stamp, part in parts.items()]
    about = json.dumps({"identity": sample_index.identity, "shards": shards})
    _keep(file, lambda partial: np.save(partial, counts))
    _keep(_text_shards(folder, text), lambda partial: partial.write_text(about, encoding="utf-8"))
    with contextlib.suppress(OSError, ValueError):
        mapped = load_array(file)
        _forget(folder, [_text_part(folder, stamp, text) for stamp in stamps])
        return mapped
    return counts


def due_shards(path: Location | str, text: TextOf) -> list[ShardTask]:
    """The shards of a data set that ``open_sample_index`` and ``text_tokens`` would read or take from their parts, the
    same ones until these have been called."""
    folder, identity = locate_dataset(path), dataset_identity(path)
    earlier, whole = load_earlier(folder), load_index(folder, identity)
    indexed = {shard.stamp for shard in earlier[1]} if earlier else set()
    counted = {shard.stamp for shard in _earlier_text(folder, text)[1]}
    has_text = _text_file(folder, identity, text)
    if whole is not None and isinstance(has_text, Path) and has_text.exists():
        return []
    tasks = [
        ShardTask(folder, stamp, whole is None and stamp not in indexed, None if stamp in counted else text)
        for stamp in stamp_shards(folder)
    ]
    return [task for task in tasks if task.index or task.text is not None]


def is_measured(task: ShardTask) -> bool:
    """Whether all that is asked for is kept."""
    files = [_index_part(task.folder, task.stamp)] if task.index else []
    files += [_text_part(task.folder, task.stamp, task.text)] if task.text is not None else []
    return all(isinstance(file, Path) and file.exists() for file in files)


def measure_shard(task: ShardTask) -> tuple[SampleIndex | None, Ints | None]:
    """What is asked for of one shard, found before or now; kept for others where the folder can be written.

    Raises UserError if the shard cannot be read.
    """
    folder, stamp, text = task.folder, task.stamp, task.text
    index = _load_index_part(folder, stamp) if task.index else None
    counts = _load_text_part(folder, stamp, text) if text is not None else None
    due_index, due_text = task.index and index is None, text is not None and counts is None
    if not due_index and not due_text:
        return index, counts
    scanned: list[ScannedSample] = []
    counted: list[int] = []
    for key, entry in iterate_entries(folder / stamp.name, stamp.promised, None if due_index else ("json",)):
        if due_index:
            scanned.append(scan_entry(key, entry, stamp.name))
        if text is not None and due_text:
            counted.append(count_text(entry, text.tokenizer, text.system))
    if due_index:
        index = assemble_index(folder, stamp.name, scanned)
        _keep_index_part(folder, stamp, index)
    if text is not None and due_text:
        counts = np.array(counted, dtype=np.int32)
        _keep_text_part(folder, stamp, text, counts)
    return index, counts


def _of_shards(
    stamps: Sequence[ShardStamp],
    known: Sequence[MeasuredShard],
    old: Callable[[int, int], Found],
    new: Callable[[ShardStamp], Found],
) -> dict[ShardStamp, Found]:
    """What is found of each shard: ``old`` of samples begin to end if it is a ``known`` one, else ``new``."""
    ends = np.cumsum([0, *(shard.samples for shard in known)]).tolist()
    place = {shard.stamp: (ends[n], ends[n + 1]) for n, shard in enumerate(known)}
    return {stamp: old(*place[stamp]) if stamp in place else new(stamp) for stamp in stamps}


def _earlier_text(folder: Location, text: TextOf) -> tuple[Ints, list[MeasuredShard]]:
    """The counts that were put together last, of whatever shards, and what these were."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        said = json.loads(read_text(_text_shards(folder, text)))
        known = [MeasuredShard.from_json(shard) for shard in said["shards"]]
        counts = load_array(_text_file(folder, said["identity"], text))
        if len(counts) == sum(shard.samples for shard in known):
            return counts, known
    return np.zeros(0, np.int32), []


def _text_file(folder: Location, identity: str, text: TextOf) -> Location:
    return folder / INDEX_FOLDER / f"text-{text.hash(identity)}.npy"


def _text_shards(folder: Location, text: TextOf) -> Location:
    return folder / INDEX_FOLDER / f"text-{text.hash()}.json"


def _index_part(folder: Location, stamp: ShardStamp) -> Location:
    return folder / PARTS_FOLDER / f"samples-{_hash(astuple(stamp))}.npz"


def _text_part(folder: Location, stamp: ShardStamp, text: TextOf) -> Location:
    return folder / PARTS_FOLDER / f"text-{text.hash(astuple(stamp))}.npy"


def _hash(*about: Any) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _load_index_part(folder: Location, stamp: ShardStamp) -> SampleIndex | None:
    file = _index_part(folder, stamp)
    if isinstance(file, Path):
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(file) as arrays:
            return index_of(folder, json.loads(str(arrays["description"])), arrays)
    return None


def _keep_index_part(folder: Location, stamp: ShardStamp, index: SampleIndex) -> None:
    arrays: dict[str, Any] = {**arrays_of(index), "description": np.array(json.dumps(description_of(index)))}
    _keep(_index_part(folder, stamp), lambda partial: np.savez(partial, **arrays))


def _load_text_part(folder: Location, stamp: ShardStamp, text: TextOf) -> Ints | None:
    file = _text_part(folder, stamp, text)
    if isinstance(file, Path):
        with contextlib.suppress(OSError, ValueError):
            counts: Ints = np.load(file)
            return counts
    return None


def _keep_text_part(folder: Location, stamp: ShardStamp, text: TextOf, counts: Ints) -> None:
    _keep(_text_part(folder, stamp, text), lambda partial: np.save(partial, counts))


def _keep(file: Location, write: Callable[[Path], object]) -> None:
    """``write(file)``, where files can be written."""
    if isinstance(file, Path):
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(file) as partial:
                write(partial)


def _forget(folder: Location, parts: Sequence[Location]) -> None:
    """Removes parts that were put together."""
    if not isinstance(folder, Path):
        return
    with contextlib.suppress(OSError):
        for part in parts:
            Path(str(part)).unlink(missing_ok=True)
        (folder / PARTS_FOLDER).rmdir()
