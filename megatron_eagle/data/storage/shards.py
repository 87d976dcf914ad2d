"""What one sample looks like inside a WebDataset shard, for whoever writes or reads one.

    000000012-cat.json      {"id": "cat", "image": ["0.png", "1.jpg"], "conversations": [...], ...}
    000000012-cat.0.png     the bytes of the image file, unchanged
    000000012-cat.1.jpg
    000000012-cat.v0.mp4    "video" in the record, like "image"; a clip is {"path", "start", "end"} there

Pages of a document are images; "image_documents" in the record says which document each belongs to.

A data set is a folder of such tar files with Energon's ``.nv-meta`` beside them.
"""

import json
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.data.media.file_slice import VIDEO_ENDINGS, FileSlice
from megatron_eagle.data.sample.conversation import Conversation, parse_record
from megatron_eagle.data.storage.location import Location, locate_dataset, openable, read_text
from megatron_eagle.errors import BrokenSample, UserError

META_FOLDER = ".nv-meta"
INFO_FILE = f"{META_FOLDER}/.info.json"
INDEX_FILE = f"{META_FOLDER}/index.sqlite"
IDENTITY_FILE = f"{META_FOLDER}/index.uuid"


@dataclass(frozen=True)
class StoredSample:
    """A conversation, the bytes of its images in the order of their markers, and its videos, likewise."""

    conversation: Conversation
    images: tuple[bytes, ...]
    videos: tuple[bytes | FileSlice, ...] = ()


def sample_key(number: int, sample_id: str) -> str:
    """A unique, sortable key that is safe as a file name; Energon ends a key at the first dot."""
    return f"{number:09d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', sample_id)[:40]}"


def parse_conversation(entry: Mapping[str, object]) -> Conversation:
    """The conversation from a sample's files, name ending -> bytes; raises BrokenSample."""
    text = entry.get("json")
    if not isinstance(text, bytes):
        raise BrokenSample("no .json file in the shard for this sample")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenSample(f"not JSON: {error}") from error
    return parse_record(record)


def parse_entry(entry: Mapping[str, object]) -> StoredSample:
    """A sample from its files, name ending -> bytes; raises BrokenSample."""
    conversation = parse_conversation(entry)
    images, videos = [], []
    for name in conversation.images:
        image = entry.get(name)
        if not isinstance(image, bytes):
            raise BrokenSample(f"no image {name} in the shard for this sample")
        images.append(image)
    for name in conversation.videos:
        video = entry.get(name)
        if not isinstance(video, bytes | FileSlice):
            raise BrokenSample(f"no video {name} in the shard for this sample")
        videos.append(video)
    return StoredSample(conversation, tuple(images), tuple(videos))


def shard_counts(path: Location | str) -> dict[str, int]:
    """Samples of each shard, by file name; raises UserError if this is no prepared data set."""
    file = locate_dataset(path) / INFO_FILE
    try:
        counts = {str(name): int(count) for name, count in json.loads(read_text(file))["shard_counts"].items()}
    except FileNotFoundError:
        raise UserError(f"{path}: not a data set made by 'megatron-eagle data build' (no {INFO_FILE})") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    return counts


def dataset_identity(path: Location | str) -> str:
    """A string that is the same for the same shards, wherever they lie."""
    try:
        return read_text(locate_dataset(path) / IDENTITY_FILE).strip()
    except OSError as error:
        raise UserError(f"{path}: not a data set made by 'megatron-eagle data build' ({error})") from error


def iterate_samples(path: Path | str) -> Iterator[StoredSample]:
    """Every sample of a data set once, in the order of the shards, for evaluation.

    A held-out split must be whole, so a broken sample is a UserError here, not a skip.
    """
    for shard, count in shard_counts(path).items():
        for key, entry in iterate_entries(locate_dataset(path) / shard, count):
            try:
                yield parse_entry(entry)
            except BrokenSample as error:
                raise UserError(f"{path}: sample {key} in {shard}: {error}") from error


Entry = dict[str, bytes | FileSlice]


def iterate_entries(shard: Location, count: int, endings: Collection[str] | None = None) -> Iterator[tuple[str, Entry]]:
    """(key, files by name ending) of each sample of a tar file, where a sample's files lie next to each other.

    Videos are not read, only their places. count: samples that are due; a tar file with a damaged header, or one that
    is cut off between two members, would merely seem shorter. endings: the files that are read, all without it. Raises
    UserError if the tar file cannot be read, or has fewer samples.
    """
    key = ""
    entry: Entry = {}
    seen = 0
    try:
        file = openable(shard)
        with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                member_key, _, ending = member.name.partition(".")
                if member_key != key and entry:
                    yield key, entry
                    entry, seen = {}, seen + 1
                key = member_key
                if ending.rpartition(".")[2] in VIDEO_ENDINGS:
                    entry[ending] = FileSlice(file, member.offset_data, member.size)
                    continue
                wanted = endings is None or ending in endings
                content = tar.extractfile(member) if wanted else None
                entry[ending] = content.read() if content is not None else b""
    except (OSError, tarfile.TarError) as error:
        after = f" after sample {key}" if key else ""
        raise UserError(f"{shard}: cannot be read{after}: {' '.join(str(error).split())}") from error
    if entry:
        yield key, entry
        seen += 1
    if seen < count:
        raise UserError(
            f"{shard}: ends after {seen} of {count} samples, the last is {key!r}; 'megatron-eagle data check "
            f"{shard.parent}' says more"
        )
