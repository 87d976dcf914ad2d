"""One block of samples -> one shard: media looked at, good samples into a tar file, bad ones into its list.

A block's result is a tar file with its checksums and, written last, a small file of counts and rejected samples, which
says that the shard is finished. All three depend on the block alone, so blocks may be built by any process, on any
machine, in any order.
"""

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_eagle.data.build.document_pages import with_pages
from megatron_eagle.data.build.forms.draft import shorten
from megatron_eagle.data.build.sources import Item, locate
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.frames import Stretch, cut_clip
from megatron_eagle.data.media.images import decode_image, read_extension
from megatron_eagle.data.media.pages import read_pages
from megatron_eagle.data.media.sniff import HEAD, sniff
from megatron_eagle.data.media.video import NoVideos, VideoReader
from megatron_eagle.data.sample.conversation import Conversation
from megatron_eagle.data.sample.markers import Kind
from megatron_eagle.data.storage.checksums import SummedWriter
from megatron_eagle.data.storage.shards import sample_key
from megatron_eagle.data.storage.whole_file import written_whole
from megatron_eagle.errors import BrokenSample

STATE_FOLDER = ".state"
MOST_LISTED = 200  # characters of any value in the list of rejected samples


@dataclass(frozen=True)
class Block:
    """number: of the block in the source, and of its shard; items: its samples, good ones and rejected ones."""

    number: int
    items: tuple[Item, ...]

    @property
    def weight(self) -> int:
        return sum(item.weight for item in self.items)


@dataclass(frozen=True)
class ShardReport:
    """What became of a block; rejected: place, id and reason of each bad sample.

    files, files_rejected: of the source, in good samples and in rejected ones. renamed: ids that were made unique, as
    [the sample's id now] of the first few, and their number.
    """

    number: int
    read: int
    written: int
    rejected: list[dict[str, Any]]
    files: int = 0
    files_rejected: int = 0
    renamed: int = 0
    renamed_first: str = ""


@dataclass(frozen=True)
class _Medium:
    """A file that goes into a shard, and the name ending its format asks for, whatever it was called."""

    extension: str
    content: bytes | FileSlice


def shard_name(number: int) -> str:
    """The tar file of a block."""
    return f"shard-{number:06d}.tar"


def read_report(folder: Path, number: int) -> ShardReport | None:
    """The report of a block that is finished, or None; without checksums, as once, it has to be built again."""
    if not checksums_file(folder, number).exists():
        return None
    try:
        return ShardReport(**json.loads(_state_file(folder, number).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def _state_file(folder: Path, number: int) -> Path:
    return folder / STATE_FOLDER / f"shard-{number:06d}.json"


def checksums_file(folder: Path, number: int) -> Path:
    """Where the checksums of a shard wait for those of the others."""
    return folder / STATE_FOLDER / f"checksums-{number:06d}"


def spool_file(folder: Path, number: int) -> Path:
    """Where media lie that the records of a block held themselves."""
    return folder / STATE_FOLDER / f"inline-{number:06d}"


def build_shard(block: Block, folder: Path, max_pixels: int) -> ShardReport:
    """Builds one shard of ``folder``; a block without a good sample leaves none, only its report."""
    partial = folder / f".{shard_name(block.number)}.partial"
    rejected: list[dict[str, Any]] = []
    written = files = 0
    renamed: list[str] = []
    with _open_tar(partial) as (summed, tar):
        for item in block.items:
            try:
                if not isinstance(item.content, Conversation):
                    raise BrokenSample(item.content)
                pictures = _load_pictures(item, item.content, max_pixels)
                videos = _load_videos(item, item.content, max_pixels)
            except BrokenSample as error:
                entry = {**item.place, "id": item.claimed_id, "reason": str(error)}
                rejected.append({name: _short(value) for name, value in entry.items()})
                continue
            content = with_pages(item.content, {number: len(pictures[number]) for number in item.documents})
            images = [image for own in pictures.values() for image in own]
            _add(tar, summed, item.number, content, images, videos)
            written += 1
            files += item.files
            renamed += [item.content.id] if item.renamed else []
    if written:
        os.replace(partial, folder / shard_name(block.number))
    else:
        partial.unlink()
    checksums_file(folder, block.number).write_bytes(summed.members())
    spool_file(folder, block.number).unlink(missing_ok=True)
    files_rejected = sum(item.files for item in block.items) - files
    report = ShardReport(
        block.number, len(block.items), written, rejected, files, files_rejected, len(renamed), "".join(renamed[:1])
    )
    write_atomically(_state_file(folder, block.number), json.dumps(asdict(report)))
    return report


@contextlib.contextmanager
def _open_tar(path: Path) -> Iterator[tuple[SummedWriter, tarfile.TarFile]]:
    with open(path, "wb") as file:
        summed = SummedWriter(file)
        # Of a file that is written, tarfile asks for write and tell alone.
        with tarfile.open(fileobj=cast(BinaryIO, summed), mode="w", format=tarfile.GNU_FORMAT) as tar:
            yield summed, tar


def write_atomically(path: Path, text: str) -> None:
    """The file is there whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= MOST_LISTED else f"{value[: MOST_LISTED - 3]}..."
    # A number may have thousands of digits, too many even to be written down.
    return "a number of many digits" if isinstance(value, int) and value.bit_length() > 4 * MOST_LISTED // 2 else value


def _load_pictures(item: Item, conversation: Conversation, max_pixels: int) -> dict[int, list[_Medium]]:
    """Each image once, by its number: one that is shown again is stored once; of a document all its pages."""
    names = dict(zip(conversation.numbers("image"), conversation.images, strict=True))
    return {
        number: _load_pages(item, number, name, max_pixels)
        if number in item.documents
        else [_load_image(item, name, max_pixels)]
        for number, name in names.items()
    }


def _load_videos(item: Item, conversation: Conversation, max_pixels: int) -> list[_Medium]:
    """Each video once, by its number."""
    clips = conversation.video_clips or (None,) * len(conversation.videos)
    shown = dict(zip(conversation.numbers("video"), zip(conversation.videos, clips, strict=True), strict=True))
    return [_load_video(item, name, clip, max_pixels) for name, clip in shown.values()]


def _load_image(item: Item, name: str, max_pixels: int) -> _Medium:
    """An image file that has been decoded once, to be sure."""
    part = locate(item, name, "image")
    try:
        data = part.read()
        if sniff(data[:HEAD]).kind == "document":
            raise BrokenSample("a PDF, whose key is 'document'")
        decode_image(data, max_pixels=max_pixels)
        return _Medium(read_extension(data, max_pixels=max_pixels), data)
    except BrokenSample as error:
        raise BrokenSample(f"image {shorten(name)}: {error}") from error
    except OSError as error:
        raise BrokenSample(f"image {shorten(name)} cannot be read: {error.strerror}") from error


def _load_pages(item: Item, number: int, name: str, max_pixels: int) -> list[_Medium]:
    part = locate(item, name, "document")
    try:
        pages = read_pages(part, item.documents[number], max_pixels=max_pixels)
        return [_Medium(read_extension(page, max_pixels=max_pixels), page) for page in pages]
    except BrokenSample as error:
        raise BrokenSample(f"document {shorten(name)}: {error}") from error
    except OSError as error:
        raise BrokenSample(f"document {shorten(name)} cannot be read: {error.strerror}") from error


def _load_video(item: Item, name: str, clip: Stretch | None, max_pixels: int) -> _Medium:
    """A video whose first and last frame have been decoded; the file itself is copied only when it is written."""
    part = locate(item, name, "video")
    try:
        _require_film(part)
        with VideoReader(part, max_pixels=max_pixels) as reader:
            reader.check(reader.info if clip is None else cut_clip(reader.info, clip))
            return _Medium(reader.extension, part)
    except (BrokenSample, NoVideos) as error:  # the images of a source can be had without the package for videos
        raise BrokenSample(f"video {shorten(name)}: {error}") from error
    except OSError as error:
        raise BrokenSample(f"video {shorten(name)} cannot be read: {error.strerror}") from error


def _require_film(part: FileSlice) -> None:
    """FFmpeg makes a film of one frame of a picture, and of any file that has a JPEG somewhere inside."""
    with part.open() as file:
        content = sniff(file.read(HEAD))
    if content.kind not in ("video", None) and content.name != "GIF":
        own_key = f", whose key is '{content.kind}'" if content.kind in ("image", "document") else ""
        raise BrokenSample(f"is {content.name}{own_key}, not a video")


def _add(
    tar: tarfile.TarFile,
    summed: SummedWriter,
    number: int,
    conversation: Conversation,
    images: list[_Medium],
    videos: list[_Medium],
) -> None:
    """Entries have no dates or owners, so that bytes depend on content only."""
    key = sample_key(number, conversation.id)
    image_names = [f"{place}.{image.extension}" for place, image in enumerate(images)]
    video_names = [f"v{place}.{video.extension}" for place, video in enumerate(videos)]
    shown_images = _shown(conversation, "image", image_names)
    stored = conversation.to_record(shown_images, _shown(conversation, "video", video_names))
    record = json.dumps(stored, ensure_ascii=False)
    contents = [record.encode(), *(medium.content for medium in [*images, *videos])]
    for name, content in zip(["json", *image_names, *video_names], contents, strict=True):
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size = len(content) if isinstance(content, bytes) else content.size
        with io.BytesIO(content) if isinstance(content, bytes) else content.open() as file:
            tar.addfile(info, file)
        summed.end_member()


def _shown(conversation: Conversation, kind: Kind, stored: list[str]) -> list[str]:
    """The stored name of each medium shown, in the order of the markers."""
    numbers = conversation.numbers(kind)
    names = dict(zip(dict.fromkeys(numbers), stored, strict=True))
    return [names[number] for number in numbers]
