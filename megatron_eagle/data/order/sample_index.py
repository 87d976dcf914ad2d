"""What is known of a data set without opening its shards: each sample's key, id, sizes of media and tokens of text.

A planned order of packs needs the lengths of all samples before the first one is read. They are found once
(``measuring.py``) and kept in ``.eagle-meta`` beside Energon's ``.nv-meta``: sizes of images and lengths of videos are
facts of the data; tokens of text depend on tokenizer and system text and are kept once for each pair. Tiles follow from
sizes by arithmetic, so another tiling rule or longer packs need no second reading. Numbers are plain ``.npy`` files,
mapped into memory, not loaded: readers of one machine share them.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eagle.data.media.frames import VideoInfo
from megatron_eagle.data.order.shard_stamps import MeasuredShard
from megatron_eagle.data.sample.visual_plan import Pictures
from megatron_eagle.data.storage.location import Location, load_array, locate_dataset, read_text
from megatron_eagle.data.storage.shards import dataset_identity

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

    def part(self, begin: int, end: int) -> "Names":
        """The names from number ``begin`` to before ``end``."""
        starts = self.starts[begin : end + 1]
        return Names(self.text[starts[0] : starts[-1]], starts - starts[0])

    @staticmethod
    def joined(parts: Sequence["Names"]) -> "Names":
        """The names of all parts, one part after another."""
        text = np.concatenate([np.zeros(0, np.uint8), *(part.text for part in parts)])
        return Names(text, _one_after_another([part.starts for part in parts]))


def _one_after_another(starts: Sequence[Ints]) -> Ints:
    """int64 [n + 1], where each begins: of parts that each begin at 0, put one after another."""
    before = np.cumsum([0, *(part[-1] for part in starts)])
    moved = [part[:-1] + begin for part, begin in zip(starts, before, strict=False)]
    return np.concatenate([*moved, before[-1:]]).astype(np.int64)


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

    def part(self, begin: int, end: int) -> "SampleIndex":
        """Of the samples from number ``begin`` to before ``end``."""
        images, videos = (first[begin : end + 1] for first in (self.first_image, self.first_video))
        by_sample = {
            name: {n - begin: own for n, own in getattr(self, name).items() if begin <= n < end} for name in BY_SAMPLE
        }
        return SampleIndex(
            path=self.path,
            identity=self.identity,
            keys=self.keys.part(begin, end),
            ids=self.ids.part(begin, end),
            image_sizes=self.image_sizes[images[0] : images[-1]],
            first_image=images - images[0],
            videos=self.videos[videos[0] : videos[-1]],
            first_video=videos - videos[0],
            **by_sample,
        )

    @staticmethod
    def joined(path: Location, identity: str, parts: Sequence["SampleIndex"]) -> "SampleIndex":
        """Of the samples of all parts, one part after another: what one made of all of them would be."""
        before = np.cumsum([0, *map(len, parts)]).tolist()
        by_sample: dict[str, Any] = {
            name: {
                begin + n: own
                for begin, part in zip(before, parts, strict=False)
                for n, own in getattr(part, name).items()
            }
            for name in BY_SAMPLE
        }
        return SampleIndex(
            path=path,
            identity=identity,
            keys=Names.joined([part.keys for part in parts]),
            ids=Names.joined([part.ids for part in parts]),
            image_sizes=np.concatenate([np.zeros((0, 2), np.int32), *(part.image_sizes for part in parts)]),
            first_image=_one_after_another([part.first_image for part in parts]),
            videos=np.concatenate([np.zeros((0, 4)), *(part.videos for part in parts)]),
            first_video=_one_after_another([part.first_video for part in parts]),
            **by_sample,
        )


def count_mapped(path: Location | str) -> int | None:
    """Samples of a data set whose index lies on this machine's disk, with one array opened; None of any other.

    Raises UserError if ``path`` is no prepared data set.
    """
    samples = locate_dataset(path) / SAMPLES_FOLDER
    if not isinstance(samples, Path):
        return None
    description = _description(samples)
    if description is None or description["identity"] != dataset_identity(path):
        return None
    with contextlib.suppress(OSError, ValueError):
        return len(load_array(samples / "key_starts.npy")) - 1
    return None


def arrays_of(sample_index: SampleIndex) -> dict[str, NDArray[Any]]:
    """What is kept of an index as arrays, by name."""
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


def description_of(sample_index: SampleIndex) -> dict[str, Any]:
    """The rest, for JSON; most samples are not in it."""
    description: dict[str, Any] = {"identity": sample_index.identity, "broken": sample_index.broken}
    return description | {name: by_sample for name in _OF_FEW if (by_sample := getattr(sample_index, name))}


def index_of(path: Location, description: dict[str, Any], array: Mapping[str, NDArray[Any]]) -> SampleIndex:
    """The index of which these are ``description_of`` and ``arrays_of``."""
    return SampleIndex(
        path=path,
        identity=description["identity"],
        keys=Names(array["keys"], array["key_starts"]),
        ids=Names(array["ids"], array["id_starts"]),
        image_sizes=array["image_sizes"],
        first_image=array["first_image"],
        videos=array["videos"],
        first_video=array["first_video"],
        broken={int(number): reason for number, reason in description["broken"].items()},
        **{name: {int(n): tuple(own) for n, own in description.get(name, {}).items()} for name in _OF_FEW},
    )


def save_index(sample_index: SampleIndex, shards: Sequence[MeasuredShard] = ()) -> None:
    """Writes the folder under another name first, so that it is there whole or not at all.

    shards: what it was made of, so that those of them which stay need not be read for the next one.
    """
    if not isinstance(sample_index.path, Path):  # an object store is only read
        return
    final = sample_index.path / SAMPLES_FOLDER
    final.parent.mkdir(exist_ok=True)
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        for name, array in arrays_of(sample_index).items():
            np.save(partial / f"{name}.npy", array)
        description = description_of(sample_index) | (
            {"shards": [shard.to_json() for shard in shards]} if shards else {}
        )
        (partial / DESCRIPTION_FILE).write_text(json.dumps(description), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        with contextlib.suppress(FileExistsError):  # another process was faster; it wrote the same
            os.rename(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_index(folder: Location, identity: str) -> SampleIndex | None:
    """The index on disk, or None if there is none, or one of other shards."""
    description = _description(folder / SAMPLES_FOLDER)
    return _opened(folder, description) if description is not None and description["identity"] == identity else None


def load_earlier(folder: Location) -> tuple[SampleIndex, list[MeasuredShard]] | None:
    """The index on disk, of whatever shards, and what these were; None if there is none or it does not say."""
    description = _description(folder / SAMPLES_FOLDER)
    if description is None or "shards" not in description:
        return None
    index = _opened(folder, description)
    return None if index is None else (index, [MeasuredShard.from_json(shard) for shard in description["shards"]])


def _opened(folder: Location, description: dict[str, Any]) -> SampleIndex | None:
    with contextlib.suppress(OSError, ValueError):
        arrays = {name: load_array(folder / SAMPLES_FOLDER / f"{name}.npy") for name in _ARRAY_NAMES}
        return index_of(folder, description, arrays)
    return None


def _description(samples: Location) -> dict[str, Any] | None:
    """What an index on disk says beside its arrays."""
    try:
        description: dict[str, Any] = json.loads(read_text(samples / DESCRIPTION_FILE))
        return description if "identity" in description and "broken" in description else None
    except (OSError, ValueError, TypeError):
        return None


_OF_FEW = ("video_numbers", "video_starts", "image_documents", "image_numbers")  # by sample; most have none
BY_SAMPLE = ("broken", *_OF_FEW)
_ARRAY_NAMES = ("keys", "key_starts", "ids", "id_starts", "image_sizes", "first_image", "videos", "first_video")
