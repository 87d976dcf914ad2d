"""What is known of a data set without opening its shards: each sample's key, id, sizes of media and tokens of text.

A planned order of packs needs the lengths of all samples before the first one is read. They are found once, when a data
set is built (or first met, if another program made the shards), and kept in ``.eagle-meta`` beside Energon's
``.nv-meta``: sizes of images and lengths of videos are facts of the data; tokens of text depend on tokenizer and system
text and are kept once for each pair. Tiles follow from sizes by arithmetic, so another tiling rule or longer packs need
no second reading. Numbers are plain ``.npy`` files, mapped into memory, not loaded: readers of one machine share them.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eagle.data.media.frames import VideoInfo, cut_clip
from megatron_eagle.data.media.images import read_size
from megatron_eagle.data.media.video import read_info
from megatron_eagle.data.sample.chatml import TEXT_FORMAT, encode_conversation
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.data.sample.visual_plan import Pictures
from megatron_eagle.data.storage.location import Location, load_array, locate_dataset, read_text
from megatron_eagle.data.storage.shards import (
    StoredSample,
    dataset_identity,
    iterate_entries,
    parse_conversation,
    parse_entry,
    shard_counts,
)
from megatron_eagle.errors import BrokenSample

INDEX_FOLDER = ".eagle-meta"
SAMPLES_FOLDER = f"{INDEX_FOLDER}/samples-3"
DESCRIPTION_FILE = "samples.json"
NAMES_AT_ONCE = 65_536  # whose bytes are looked up together: 10 bytes of memory for each of theirs
BROKEN_TOKENS = 0  # in the tokens of a sample that cannot be parsed

Ints = NDArray[np.integer]


class Names:
    """Many short texts in two arrays: UTF-8 bytes uint8 [b], and where each begins int64 [n + 1]."""

    def __init__(self, text: NDArray[np.uint8], starts: Ints) -> None:
        self.text, self.starts = text, starts

    @staticmethod
    def of(names: Iterable[str]) -> "Names":
        encoded = [name.encode(errors="surrogateescape") for name in names]
        starts = np.concatenate([[0], np.cumsum([len(name) for name in encoded], dtype=np.int64)])
        return Names(np.frombuffer(b"".join(encoded), dtype=np.uint8), starts.astype(np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        return self.text[self.starts[index] : self.starts[index + 1]].tobytes().decode(errors="surrogateescape")

    def take(self, chosen: Ints) -> "Names":
        """The names of these numbers, in that order."""
        if len(chosen) <= NAMES_AT_ONCE:
            return self._take(chosen)
        parts = [chosen[begin : begin + NAMES_AT_ONCE] for begin in range(0, len(chosen), NAMES_AT_ONCE)]
        return Names.joined([self._take(part) for part in parts])

    def _take(self, chosen: Ints) -> "Names":
        begins = self.starts[chosen]
        starts = np.concatenate([[0], np.cumsum(self.starts[chosen + 1] - begins)])
        where = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], np.diff(starts))
        return Names(self.text[where], starts)

    @staticmethod
    def joined(parts: Sequence["Names"]) -> "Names":
        """The names of all parts, one part after another."""
        before = np.cumsum([0, *(part.starts[-1] for part in parts)])
        starts = [part.starts[:-1] + begin for part, begin in zip(parts, before, strict=False)]
        text = np.concatenate([np.zeros(0, np.uint8), *(part.text for part in parts)])
        return Names(text, np.concatenate([*starts, before[-1:]]).astype(np.int64))


@dataclass(frozen=True)
class SampleIndex:
    """The samples of one data set in the order of its shards.

    identity: same for the same shards. keys, ids: one per sample. image_sizes: int32 [m, 2], width and height of all
    images, upright; first_image: int64 [n + 1], where each sample's images begin. videos: float64 [v, 4], width,
    height, seconds and frames a second; first_video: int64 [n + 1]. broken: reasons, by sample number.
    video_numbers: by sample number, of those whose videos are not numbered 1, 2, 3, ... video_starts: of those with
    clips, whose lengths are in ``videos``. image_documents: of those with documents; image_numbers: of these, if they
    are not numbered 1, 2, 3, ...
    """

    path: Location
    identity: str
    keys: Names
    ids: Names
    image_sizes: Ints
    first_image: Ints
    videos: NDArray[np.float64]
    first_video: Ints
    broken: dict[int, str]
    video_numbers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    video_starts: dict[int, tuple[float, ...]] = field(default_factory=dict)
    image_documents: dict[int, tuple[int, ...]] = field(default_factory=dict)
    image_numbers: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def pictures_of(self, sample: int) -> Pictures:
        """Images and videos of a sample."""
        own = self.image_sizes[self.first_image[sample] : self.first_image[sample + 1]]
        videos = self.videos[self.first_video[sample] : self.first_video[sample + 1]]
        starts = self.video_starts.get(sample, (0.0,) * len(videos))
        return Pictures(
            tuple((int(width), int(height)) for width, height in own),
            tuple(
                VideoInfo(int(w), int(h), float(seconds), float(rate), start)
                for (w, h, seconds, rate), start in zip(videos, starts, strict=True)
            ),
            self.video_numbers.get(sample, ()),
            self.image_documents.get(sample, ()),
            self.image_numbers.get(sample, ()),
        )


@dataclass(frozen=True)
class ScannedSample:
    """One sample as found in a shard; ``reason`` says why it is broken, if it is."""

    key: str
    id: str
    pictures: Pictures
    reason: str | None


def open_sample_index(path: Location | str) -> SampleIndex:
    """The sample_index of a data set; it is made (and kept, where the folder can be written) if there is none yet.

    Raises UserError if ``path`` is no prepared data set or a shard cannot be read.
    """
    folder, identity = locate_dataset(path), dataset_identity(path)
    found = _load(folder, identity)
    if found is not None:
        return found
    scanned = [sample for shard, count in shard_counts(path).items() for sample in scan_shard(folder / shard, count)]
    made = _assemble(folder, identity, scanned)
    with contextlib.suppress(OSError):  # a read-only data set: this process keeps it in memory
        _save(made)
    return _load(folder, identity) or made


def count_mapped(path: Location | str) -> int | None:
    """Samples of a data set whose index lies on this machine's disk, with one array opened; None of any other.

    Raises UserError if ``path`` is no prepared data set.
    """
    samples = locate_dataset(path) / SAMPLES_FOLDER
    if not isinstance(samples, Path) or _description(samples, dataset_identity(path)) is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        return len(load_array(samples / "key_starts.npy")) - 1
    return None


def scan_shard(shard: Location, count: int) -> Iterator[ScannedSample]:
    """Every sample of a tar file, ``count`` or more; only headers of its media are looked at.

    All sizes are let through: they are facts, and which ones are too large is for the reader to say.
    """
    for key, entry in iterate_entries(shard, count):
        sample_id = key
        try:
            stored = parse_entry(entry)
            sample_id = stored.conversation.id
            yield ScannedSample(key, sample_id, read_pictures(stored, sys.maxsize), None)
        except BrokenSample as error:
            yield ScannedSample(key, sample_id, Pictures(), f"{error} ({shard.name}: {key})")


def read_pictures(stored: StoredSample, max_pixels: int) -> Pictures:
    """Sizes of a sample's media, from their headers; raises BrokenSample."""
    conversation = stored.conversation
    films = [read_info(video, max_pixels=max_pixels) for video in stored.videos]
    clips = conversation.video_clips or (None,) * len(films)
    return Pictures(
        tuple(read_size(image, max_pixels=max_pixels) for image in stored.images),
        tuple(film if clip is None else cut_clip(film, clip) for film, clip in zip(films, clips, strict=True)),
        conversation.video_numbers,
        conversation.image_documents,
        conversation.image_numbers if conversation.image_documents else (),
    )


def _assemble(folder: Location, identity: str, scanned: Sequence[ScannedSample]) -> SampleIndex:
    sizes = [size for sample in scanned for size in sample.pictures.sizes]
    videos = [(v.width, v.height, v.seconds, v.rate) for sample in scanned for v in sample.pictures.videos]
    return SampleIndex(
        path=folder,
        identity=identity,
        keys=Names.of(sample.key for sample in scanned),
        ids=Names.of(sample.id for sample in scanned),
        image_sizes=np.array(sizes, dtype=np.int32).reshape(-1, 2),
        first_image=np.cumsum([0, *(len(sample.pictures.sizes) for sample in scanned)], dtype=np.int64),
        videos=np.array(videos, dtype=np.float64).reshape(-1, 4),
        first_video=np.cumsum([0, *(len(sample.pictures.videos) for sample in scanned)], dtype=np.int64),
        broken={number: sample.reason for number, sample in enumerate(scanned) if sample.reason is not None},
        video_numbers={n: s.pictures.video_numbers for n, s in enumerate(scanned) if s.pictures.video_numbers},
        video_starts={
            n: tuple(video.start for video in s.pictures.videos)
            for n, s in enumerate(scanned)
            if any(video.start for video in s.pictures.videos)
        },
        image_documents={n: s.pictures.image_documents for n, s in enumerate(scanned) if s.pictures.image_documents},
        image_numbers={n: s.pictures.image_numbers for n, s in enumerate(scanned) if s.pictures.image_numbers},
    )


def _arrays(sample_index: SampleIndex) -> dict[str, NDArray[Any]]:
    return {
        "keys": sample_index.keys.text,
        "key_starts": sample_index.keys.starts,
        "ids": sample_index.ids.text,
        "id_starts": sample_index.ids.starts,
        "image_sizes": sample_index.image_sizes,
        "first_image": sample_index.first_image,
        "videos": sample_index.videos,
        "first_video": sample_index.first_video,
    }


def _save(sample_index: SampleIndex) -> None:
    """Writes the folder under another name first, so that it is there whole or not at all."""
    if not isinstance(sample_index.path, Path):  # an object store is only read
        return
    final = sample_index.path / SAMPLES_FOLDER
    final.parent.mkdir(exist_ok=True)
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        for name, array in _arrays(sample_index).items():
            np.save(partial / f"{name}.npy", array)
        description: dict[str, Any] = {"identity": sample_index.identity, "broken": sample_index.broken}
        description |= {name: by_sample for name in _OF_FEW if (by_sample := getattr(sample_index, name))}
        (partial / DESCRIPTION_FILE).write_text(json.dumps(description), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        with contextlib.suppress(FileExistsError):  # another process was faster; it wrote the same
            os.rename(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load(folder: Location, identity: str) -> SampleIndex | None:
    """The sample_index on disk, or None if there is none, or one of other shards."""
    samples = folder / SAMPLES_FOLDER
    description = _description(samples, identity)
    if description is None:
        return None
    try:
        array = {name: load_array(samples / f"{name}.npy") for name in _ARRAY_NAMES}
    except (OSError, ValueError):
        return None
    return SampleIndex(
        path=folder,
        identity=identity,
        keys=Names(array["keys"], array["key_starts"]),
        ids=Names(array["ids"], array["id_starts"]),
        image_sizes=array["image_sizes"],
        first_image=array["first_image"],
        videos=array["videos"],
        first_video=array["first_video"],
        broken={int(number): reason for number, reason in description["broken"].items()},
        **{name: {int(n): tuple(own) for n, own in description.get(name, {}).items()} for name in _OF_FEW},
    )


def _description(samples: Location, identity: str) -> dict[str, Any] | None:
    """What an index on disk says beside its arrays, if it is of these shards."""
    try:
        description: dict[str, Any] = json.loads(read_text(samples / DESCRIPTION_FILE))
        return description if description["identity"] == identity and "broken" in description else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


_OF_FEW = ("video_numbers", "video_starts", "image_documents", "image_numbers")  # by sample; most have none
_ARRAY_NAMES = ("keys", "key_starts", "ids", "id_starts", "image_sizes", "first_image", "videos", "first_video")


def text_tokens(sample_index: SampleIndex, tokenizer: Tokenizer, system: str) -> Ints:
    """int32 [n]: tokens of each sample without tiles and frames and their words; BROKEN_TOKENS if it is broken.

    Counted once for a tokenizer and system text, and kept beside the shards.
    """
    about = [sample_index.identity, tokenizer.fingerprint, system, TEXT_FORMAT]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    file = sample_index.path / INDEX_FOLDER / f"text-{name}.npy"
    with contextlib.suppress(OSError, ValueError):
        counted = load_array(file)
        if len(counted) == len(sample_index):
            return counted
    counts = np.fromiter(_count(sample_index, tokenizer, system), dtype=np.int32, count=len(sample_index))
    if isinstance(file, Path):
        with contextlib.suppress(OSError):
            file.parent.mkdir(exist_ok=True)
            partial = file.with_name(f".{file.stem}.{uuid.uuid4().hex}.npy")
            np.save(partial, counts)
            os.replace(partial, file)
            return load_array(file)
    return counts


def _count(sample_index: SampleIndex, tokenizer: Tokenizer, system: str) -> Iterator[int]:
    for shard, count in shard_counts(sample_index.path).items():
        for _, entry in iterate_entries(sample_index.path / shard, count, endings=("json",)):
            try:
                conversation = parse_conversation(entry)
                tiles = [1] * len(conversation.images)  # of no tokens each
                no_frames = [()] * len(conversation.videos)
                yield len(encode_conversation(conversation, tokenizer, tiles, 0, system, no_frames).tokens)
            except BrokenSample:
                yield BROKEN_TOKENS
