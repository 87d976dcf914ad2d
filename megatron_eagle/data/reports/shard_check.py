"""Every byte of one shard, held against its checksums, its own tar headers and Energon's index of it.

With checksums, each member of the tar is read where the build put it, whatever its header says now. Without them the
headers are followed, from one that cannot be read to the next place that the index knows, and what the samples hold is
decoded: that finds what cannot be used, not what was changed into something else.
"""

import bisect
import contextlib
import hashlib
import io
import itertools
import sqlite3
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import simplejpeg

from megatron_eagle.compat.energon import IndexedSample, ShardIndex, sample_borders
from megatron_eagle.data.media.file_slice import VIDEO_ENDINGS, FileSlice
from megatron_eagle.data.media.images import decode_image, is_plain_jpeg
from megatron_eagle.data.media.video import VideoReader
from megatron_eagle.data.storage.checksums import BLOCK, CHUNK, Members, ShardChecksums
from megatron_eagle.data.storage.shards import INDEX_FILE, Entry, parse_entry, shard_counts
from megatron_eagle.errors import BrokenSample

# Headers that say more of the one that follows: a name of more than 100 characters, and the like.
_EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
_UNREADABLE = "its tar header is damaged"

Advance = Callable[[int], object]


@dataclass(frozen=True)
class ShardTask:
    """What is known of a shard: its number in the index, how many samples ``.info.json`` promises, and its checksums,
    if they were kept. listed: most findings to put into words."""

    folder: Path
    name: str
    number: int
    promised: int
    checksums: ShardChecksums | None
    listed: int

    @property
    def path(self) -> Path:
        return self.folder / self.name


@dataclass(frozen=True)
class ShardFate:
    """samples: due in the shard, damaged: of these. findings: their number, lines: the first of them.

    doubts: number of media that decode with a warning, doubtful: the first of them. sha256: of a shard without
    checksums.
    """

    samples: int
    damaged: int
    findings: int
    lines: tuple[str, ...]
    doubts: int = 0
    doubtful: tuple[str, ...] = ()
    sha256: bytes | None = None


@dataclass(frozen=True)
class _Member:
    """One file in a tar; begin: of its header; first, size: of its content; end: with padding.

    name: by its header, empty where that does not say it whole. fault: what is wrong, empty if nothing is.
    """

    begin: int
    first: int
    size: int
    end: int
    name: str
    fault: str = ""


def check_shard(task: ShardTask, advance: Advance = int) -> ShardFate:
    """Reads every byte of a shard; ``advance`` is told how many bytes were read since the last time."""
    due = _indexed(task)
    try:
        with open(task.path, "rb", buffering=CHUNK) as file:
            return _check(task, file, due, advance)
    except FileNotFoundError:
        why = f"is missing, with {task.promised} samples"
    except OSError as error:
        why = f"cannot be read: {error.strerror or error}; it should hold {task.promised} samples"
    return ShardFate(task.promised, task.promised, 1, (why,))


def _indexed(task: ShardTask) -> list[IndexedSample]:
    """What the index has of the shard; nothing if it cannot be read, which is said once for all shards."""
    try:
        with ShardIndex(task.folder / INDEX_FILE) as index:
            return index.samples(task.number)
    except (sqlite3.Error, TypeError):
        return []


def _check(task: ShardTask, file: BinaryIO, indexed: list[IndexedSample], advance: Advance) -> ShardFate:
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    if task.checksums is not None:
        walk = _walk_as_built(file, length, task.checksums.read(), advance)
    else:
        walk = _walk_headers(file, length, indexed)
    found = {member.first: member for member in walk}
    due = indexed or _by_headers(found)
    faults = {sample.key: own for sample in due if (own := _faults(sample, found, length))}
    doubtful: list[str] = []
    if task.checksums is None:
        for sample in due:
            own, doubts = ([], []) if sample.key in faults else _decode(task.path, file, sample)
            faults.update({sample.key: own} if own else {})
            doubtful += doubts
            advance(sample.end - sample.begin)
    lines = _lines(task, due, faults, found, length)
    if len(due) != task.promised:
        source = "the index has" if indexed else "its own headers show"
        lines.append(f"{source} {len(due)} samples of it, .info.json has {task.promised}")
    lines += _borders(task.path, due)
    return ShardFate(
        samples=max(len(due), task.promised),
        damaged=len(faults) + max(0, task.promised - len(due)),
        findings=len(lines),
        lines=tuple(lines[: task.listed]),
        doubts=len(doubtful),
        doubtful=tuple(doubtful[: task.listed]),
        sha256=_sha256(file) if task.checksums is None else None,
    )


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header(data: bytes) -> tarfile.TarInfo | None:
    """The header of a member; None if it is none, by its own checksum."""
    try:
        return tarfile.TarInfo.frombuf(data, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _walk_as_built(file: BinaryIO, length: int, members: Members, advance: Advance) -> Iterator[_Member]:
    """Every member that is there as a whole, compared."""
    place = 0
    for blocks, built in members.tolist():
        end = place + blocks * BLOCK
        if end > length:
            return
        head = file.read(BLOCK)
        crc = zlib.crc32(head)
        for chunk in _chunks(file, end - place - BLOCK):
            crc = zlib.crc32(chunk, crc)
            advance(len(chunk))
        advance(BLOCK)
        info = _header(head)
        fault = ""
        if crc != built:
            what = _UNREADABLE if info is None else "its bytes are not those that were built"
            fault = f"{what} (CRC-32 {crc:08x}, was {built:08x})"
        size = end - place - BLOCK if info is None else info.size
        yield _Member(place, place + BLOCK, size, end, "" if info is None else info.name, fault)
        place = end


def _walk_headers(file: BinaryIO, length: int, indexed: list[IndexedSample]) -> Iterator[_Member]:
    """Every member that is there as a whole; behind a header that cannot be read it goes on where the next member
    begins by the index."""
    firsts = (first - BLOCK for sample in indexed for _, first, _ in sample.files)
    begins = sorted({*firsts, *(sample.begin for sample in indexed)})
    place = 0
    while place + BLOCK <= length:
        begin, whole_name = place, True
        file.seek(place)
        head = file.read(BLOCK)
        following = bisect.bisect_right(begins, place)
        if not any(head) and begins[following - 1 : following] != [place]:
            return
        info = _header(head)
        while info is not None and info.type in _EXTENSIONS:
            whole_name = False
            place += BLOCK + _padded(info.size)
            file.seek(place)
            info = _header(file.read(BLOCK))
        if info is None:
            end = begins[following] if following < len(begins) else length
            yield _Member(begin, begin + BLOCK, end - begin - BLOCK, end, "", _UNREADABLE)
            place = end
            continue
        end = place + BLOCK + _padded(info.size if info.isreg() else 0)
        if end > length:
            return
        if info.isreg():
            yield _Member(begin, place + BLOCK, info.size, end, info.name if whole_name else "")
        place = end


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size and (chunk := file.read(min(size, CHUNK))):
        size -= len(chunk)
        yield chunk


def _by_headers(found: dict[int, _Member]) -> list[IndexedSample]:
    """Samples as the names of the members make them, where there is no index."""
    samples = []
    for key, own in itertools.groupby(found.values(), lambda m: m.name.partition(".")[0] or f"at byte {m.begin}"):
        members = list(own)
        files = tuple((m.name.partition(".")[2] or "?", m.first, m.size) for m in members)
        samples.append(IndexedSample(key, members[0].begin, members[-1].end, files))
    return samples


def _faults(sample: IndexedSample, found: dict[int, _Member], length: int) -> list[str]:
    """What is wrong with the members of a sample."""
    faults = []
    for ending, first, size in sample.files:
        name, member = f"{sample.key}.{ending}", found.get(first)
        if member is None:
            gone = _padded(first + size) > length
            faults.append(f"{name}: is cut off" if gone else f"{name}: is not at byte {first - BLOCK}")
        elif member.fault:
            faults.append(f"{name} at byte {member.begin}: {member.fault}")
        elif (member.name or name, member.size) != (name, size):
            faults.append(
                f"byte {member.begin} holds {member.name} of {member.size} bytes, the index has {name} of {size} bytes"
            )
    return faults


def _lines(
    task: ShardTask, due: list[IndexedSample], faults: dict[str, list[str]], found: dict[int, _Member], length: int
) -> list[str]:
    """A line for each damaged member; one alone for what an early end took, or for another shard's file."""
    gone = [sample.key for sample in due if _padded(max(first + size for _, first, size in sample.files)) > length]
    origin = _origin(task, due, found)
    if len(faults) == len(due) > 0 and origin:
        if task.checksums is not None and not any(member.fault for member in found.values()):
            origin = "is as it was built, and index.sqlite of other shards"
        return [f"{origin}: none of its {len(due)} samples is right; {due[0].key} should be the first"]
    left = {key: own for key, own in faults.items() if key not in gone}
    lines = [f"sample {key}: {fault}" for key, own in left.items() for fault in own]
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        return [*lines, f"is cut off at byte {length}, {due[-1].end} are due: sample {gone[0]}{more} cannot be read"]
    return [*lines, *_strangers(due, found), *_tail(task, found, length)]


def _origin(task: ShardTask, due: list[IndexedSample], found: dict[int, _Member]) -> str:
    """Whose file a shard is that begins with another sample than it should; nothing if it does not."""
    name = found[BLOCK].name if BLOCK in found else ""
    key = name.partition(".")[0]
    if not due or key in ("", due[0].key):
        return ""
    whose = "a file of another data set"
    with contextlib.suppress(sqlite3.Error, IndexError), ShardIndex(task.folder / INDEX_FILE) as index:
        number = index.shard_of(key)
        if number is not None:
            whose = f"the file of {[*shard_counts(task.folder)][number]}"
    return f"is {whose}, which begins with {name}"


def _strangers(due: list[IndexedSample], found: dict[int, _Member]) -> list[str]:
    """What the shard holds and its index does not."""
    known = {first for sample in due for _, first, _ in sample.files}
    strange = [member for member in found.values() if member.first not in known]
    if not strange:
        return []
    more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
    return [f"byte {strange[0].begin} holds {strange[0].name or 'something'}{more}, which the index does not have"]


def _tail(task: ShardTask, found: dict[int, _Member], length: int) -> list[str]:
    """What is behind the last member: two blocks of zeros or more, in our own shards up to a whole record."""
    end = max((member.end for member in found.values()), default=0)
    due = -(-(end + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    if length < end + 2 * BLOCK or (task.checksums is not None and length != due):
        return [f"has {length} bytes, {due} are due; its samples end at byte {end}"]
    with open(task.path, "rb") as file:
        file.seek(end)
        if any(chunk.strip(b"\0") for chunk in _chunks(file, length - end)):
            return [f"holds something behind its last sample, which ends at byte {end}"]
    return []


def _borders(shard: Path, due: list[IndexedSample]) -> list[str]:
    """Whether the file of borders beside the shard belongs to it."""
    wanted = [*(sample.begin for sample in due), *(sample.end for sample in due[-1:])]
    try:
        found = sample_borders(shard)
    except OSError as error:
        return [f"{shard.name}.idx cannot be read: {error.strerror or error}"]
    if found == wanted:
        return []
    if len(found) != len(wanted):
        return [f"{shard.name}.idx does not belong to it: {len(found)} borders of samples, {len(wanted)} are due"]
    place = next(n for n, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    return [f"{shard.name}.idx does not belong to it: border {place} is byte {found[place]}, {wanted[place]} is due"]


def _sha256(file: BinaryIO) -> bytes:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").digest()  # type: ignore[arg-type]


def _decode(path: Path, file: BinaryIO, sample: IndexedSample) -> tuple[list[str], list[str]]:
    """(faults, doubts) of what a sample holds: its record parsed, images decoded, packets of videos read."""
    entry: Entry = {}
    for ending, first, size in sample.files:
        file.seek(first)
        is_video = ending.rpartition(".")[2] in VIDEO_ENDINGS
        entry[ending] = FileSlice(path, first, size) if is_video else file.read(size)
    try:
        stored = parse_entry(entry)
    except BrokenSample as error:
        return [f"{sample.key}.json: {error}"], []
    faults, doubts = [], []
    for name, image in dict(zip(stored.conversation.images, stored.images, strict=True)).items():
        try:
            doubt = _decode_image(image)
        except BrokenSample as error:
            faults.append(f"{sample.key}.{name}: {error}")
        else:
            doubts += [f"sample {sample.key}: {sample.key}.{name}: {doubt}"] if doubt else []
    for name, video in dict(zip(stored.conversation.videos, stored.videos, strict=True)).items():
        try:
            _decode_video(video)
        except BrokenSample as error:
            faults.append(f"{sample.key}.{name}: {error}")
    return faults, doubts


def _decode_image(data: bytes) -> str:
    """Decodes an image of any size; returns a doubt about one that decodes, or nothing; raises BrokenSample.

    Pillow compares the checksums of a PNG, and passes over what libjpeg warns of. Warnings are common in files from the
    web, so they are no proof.
    """
    decode_image(data, max_pixels=sys.maxsize)
    if is_plain_jpeg(data, max_pixels=sys.maxsize):
        try:
            simplejpeg.decode_jpeg(data)
        except ValueError as error:
            return f"decodes, and libjpeg warns: {error}"
    return ""


def _decode_video(video: bytes | FileSlice) -> None:
    """Reads every packet of a video, and decodes its first and last frame; raises BrokenSample."""
    with VideoReader(video, max_pixels=sys.maxsize) as reader:
        reader.check(reader.info)
    try:
        with io.BytesIO(video) if isinstance(video, bytes) else video.open() as file, av.open(file, "r") as container:
            corrupt = sum(packet.is_corrupt for packet in container.demux())
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise BrokenSample(f"its packets cannot be read: {error}") from error
    if corrupt:
        raise BrokenSample(f"{corrupt} of its packets are marked as corrupt")
