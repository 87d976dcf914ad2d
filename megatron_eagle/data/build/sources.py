"""Where the samples of a new data set come from: conversation JSONL, media with captions beside them, WebDatasets.

Every source is a numbered row of ``Item``s: a checked conversation, or the reason why there is none, and where its
media lie. The same row comes out every time, so a build can be divided and continued by number. Nothing is decoded
here.

Media are grouped as a WebDataset groups them, in a folder as in a tar file: files whose names agree up to the first dot
are one sample. ``a/cat.jpg`` with ``a/cat.txt`` is an image and its caption; ``a/cat.json`` may hold a whole record of
the JSONL form, or a caption under one of CAPTION_FIELDS.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_eagle.data.media.file_slice import VIDEO_ENDINGS, FileSlice
from megatron_eagle.data.sample.conversation import Conversation, parse_record
from megatron_eagle.errors import BrokenSample

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
CAPTION_FIELDS = ("caption", "text")
DEFAULT_PROMPT = "Describe this in detail."


@dataclass(frozen=True)
class Item:
    """One sample to be.

    number: from 0, in the order of the source. place: where it stands there, for the list of rejected samples.
    claimed_id: whatever the record calls its id. content: its conversation, or the reason why it is rejected.
    root: folder that media names start from, None if all media lie in a tar file. slices: media by name, found already.
    weight: its share of the source, for the progress bar (bytes of a JSONL, 1 elsewhere).
    """

    number: int
    place: dict[str, Any]
    claimed_id: str | int | None
    content: Conversation | str
    root: Path | None
    slices: Mapping[str, FileSlice] = field(default_factory=dict)
    weight: int = 1


@dataclass(frozen=True)
class RecordSource:
    """One input of ``data build``: a JSONL file, a tar file, or a folder of media or of tar files.

    media_root: folder of a JSONL's media, its own by default. prompt: the question that a mere caption answers.
    """

    path: Path
    media_root: Path | None = None
    prompt: str = DEFAULT_PROMPT

    @property
    def _tars(self) -> list[Path]:
        if self.path.is_dir():
            return sorted(self.path.glob("*.tar"))
        return [self.path] if self.path.suffix == ".tar" else []

    def describe(self) -> dict[str, Any]:
        """What must be the same when a build is continued; raises OSError if the source is not there."""
        files = [self.path] if self.path.is_file() else self._tars
        sizes = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        self.path.stat()
        root = None if self.media_root is None else str(self.media_root.absolute())
        return {"source": str(self.path.absolute()), "files": sizes, "media_root": root, "prompt": self.prompt}

    def size(self) -> int | None:
        """Sum of the weights, where it is known beforehand."""
        return self.path.stat().st_size if self.path.is_file() and not self._tars else None

    def items(self) -> Iterator[Item]:
        """Every sample in order; a second one with the same id is rejected."""
        seen: dict[str, str] = {}
        for item in self._read():
            reason = _reject(item.content, item.place, seen) if isinstance(item.content, Conversation) else None
            yield item if reason is None else Item(**{**vars(item), "content": reason})

    def _read(self) -> Iterator[Item]:
        if self._tars:
            return _tar_items(self._tars, self.prompt)
        return _folder_items(self.path, self.prompt) if self.path.is_dir() else self._lines()

    def _lines(self) -> Iterator[Item]:
        root = self.path.parent if self.media_root is None else self.media_root
        found = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record: Any = None
                content: Conversation | str
                try:
                    record = parse_json(line, "line", mark=number == 1)
                    content = parse_record(record, default_id=f"line-{number}")
                except BrokenSample as error:
                    content = str(error)
                yield Item(found, {"line": number}, _claimed_id(record), content, root, weight=len(line))
                found += 1


def _reject(conversation: Conversation, place: Mapping[str, Any], seen: dict[str, str]) -> str | None:
    """Why a parsed conversation cannot be stored."""
    try:
        json.dumps(conversation.extra, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        return f"a field holds text that is not Unicode: {error.reason}"
    except ValueError:
        return "a field holds NaN or an infinite number, which JSON does not have"
    where = " ".join(f"{name} {value}" for name, value in place.items())
    first = seen.setdefault(conversation.id, where)
    return None if first == where else f"duplicate id {conversation.id!r}, first seen in {first}"


def parse_json(data: bytes, what: str, *, mark: bool = False) -> Any:
    """Decoded JSON; mark: a byte order mark may come first. Raises BrokenSample."""
    try:
        text = data.decode("utf-8-sig" if mark else "utf-8")
    except UnicodeDecodeError as error:
        raise BrokenSample(f"{what} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenSample(f"{what} is not JSON: {error}") from None


def _claimed_id(record: Any) -> Any:
    """Whatever the record calls its id, as far as it can be listed."""
    claimed = record.get("id") if isinstance(record, dict) else None
    return claimed if isinstance(claimed, str | int) else None


@dataclass
class _Group:
    """Files of one sample: key, and name -> where its bytes are, in the order they were found."""

    key: str
    files: dict[str, FileSlice] = field(default_factory=dict)

    def read(self, ending: str) -> bytes | None:
        """The file of this ending, or None if there is none."""
        for name, part in self.files.items():
            if _ending(name) == ending:
                try:
                    return part.read()
                except OSError as error:
                    raise BrokenSample(f"{name} cannot be read: {error.strerror}") from error
        return None

    def media(self, endings: tuple[str, ...]) -> list[str]:
        return [name for name in self.files if _ending(name) in endings]


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _folder_items(folder: Path, prompt: str) -> Iterator[Item]:
    groups: dict[str, _Group] = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            relative = str(path.relative_to(folder))
            if name.startswith(".") or not path.is_file():
                continue
            key = str(Path(relative).parent / name.partition(".")[0])
            groups.setdefault(key, _Group(key)).files[relative] = FileSlice.whole(path)
    for number, key in enumerate(sorted(groups)):
        yield _group_item(number, groups[key], {"key": key}, key, folder, prompt)


def _tar_items(tars: list[Path], prompt: str) -> Iterator[Item]:
    """Samples of tar files one after another; one that is cut off ends with a rejected sample that says so."""
    number = 0
    for tar in tars:
        # Keys need not differ from tar file to tar file.
        prefix = f"{tar.stem}/" if len(tars) > 1 else ""
        for group in _tar_groups(tar):
            place = {"tar": tar.name}
            if isinstance(group, str):
                yield Item(number, place, None, group, None)
            else:
                place["key"] = group.key
                yield _group_item(number, group, place, prefix + group.key, None, prompt)
            number += 1


def _tar_groups(path: Path) -> Iterator[_Group | str]:
    group: _Group | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                if not member.isfile() or name.startswith("."):
                    continue
                key = f"{folder}/{name.partition('.')[0]}".removeprefix("/")
                if group is not None and group.key != key:
                    yield group
                    group = None
                group = group or _Group(key)
                group.files[member.name] = FileSlice(path, member.offset_data, member.size)
            if path.stat().st_size < tar.offset + tarfile.BLOCKSIZE:  # Python takes a cut-off header for the end
                raise tarfile.ReadError("the end mark is missing")
    except (OSError, tarfile.TarError) as error:
        after = f" after the first file of {group.key}" if group is not None else ""
        yield f"{path.name} is cut off or damaged{after}: {' '.join(str(error).split())}"
        return
    if group is not None:
        yield group


def _group_item(number: int, group: _Group, place: dict[str, Any], name: str, root: Path | None, prompt: str) -> Item:
    record: Any = None
    content: Conversation | str
    try:
        record = _record(group, prompt)
        content = parse_record(record, default_id=name)
    except BrokenSample as error:
        content = str(error)
    slices = {**group.files, **{file.partition(f"{group.key}.")[2]: part for file, part in group.files.items()}}
    return Item(number, place, _claimed_id(record), content, root, slices)


def _record(group: _Group, prompt: str) -> dict[str, Any]:
    """A record of the JSONL form; media it does not name itself are all those of its group."""
    text, described = group.read("txt"), group.read("json")
    record = {} if described is None else parse_json(described, f"{group.key}.json")
    if not isinstance(record, dict):
        raise BrokenSample(f"{group.key}.json is a JSON {type(record).__name__}, not an object")
    images, videos = group.media(IMAGE_ENDINGS), group.media(VIDEO_ENDINGS)
    if "image" not in record and "video" not in record:
        record = {**record, "image": images, "video": videos}
    if "conversations" in record:
        return record
    caption = next((record.pop(name) for name in CAPTION_FIELDS if isinstance(record.get(name), str)), None)
    if text is not None:
        try:
            caption = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenSample(f"{group.key}.txt is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not images and not videos:
        raise BrokenSample(f"neither an image nor a video among {', '.join(group.files)}")
    if caption is None or not caption.strip():
        raise BrokenSample(f"no caption: neither {group.key}.txt nor {' or '.join(CAPTION_FIELDS)} in {group.key}.json")
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": caption}]
    return {**record, "conversations": turns}


def locate(item: Item, name: str, what: str) -> FileSlice:
    """Where a medium lies; paths that lead out of the root, absolute or by "..", are refused. Raises BrokenSample."""
    if name in item.slices:
        return item.slices[name]
    if item.root is None:
        raise BrokenSample(f"{what} {name} is not among the files of its sample: {', '.join(item.slices)}")
    if "\0" in name:
        raise BrokenSample(f"{what} path {name!r} holds a NUL character")
    root = os.path.abspath(item.root)
    path = os.path.abspath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        raise BrokenSample(f"{what} {name} lies outside of the media root {root}")
    try:
        return FileSlice.whole(Path(path))
    except FileNotFoundError:
        raise BrokenSample(f"{what} {name} is missing") from None
    except OSError as error:
        raise BrokenSample(f"{what} {name} cannot be read: {error.strerror}") from error
