"""Where the samples of a new data set come from: files of records, media with captions beside them, WebDatasets.

Every source is a numbered row of ``Item``s: a checked conversation, or the reason why there is none, and where its
media lie. The same row comes out every time, so a build can be divided and continued by number. Nothing is decoded
here, and every file is either part of an item or left with a reason (``walk.Ledger``).

A record is read by its form (``forms``). Media of a folder or a tar are grouped with a text (``groups``) and read by
``group_records``. A folder with ``metadata.jsonl`` is Hugging Face's image folder: its records name their files.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_eagle.data.build.containers import FoundRecord, container_of, read_records
from megatron_eagle.data.build.forms.draft import shorten
from megatron_eagle.data.build.forms.eagle import FILE_NAME
from megatron_eagle.data.build.forms.keys import Ignored
from megatron_eagle.data.build.forms.registry import DEFAULT_PROMPT, Rules, read_record
from megatron_eagle.data.build.group_records import json_of, read_group
from megatron_eagle.data.build.groups import Group, ending_of, group_files
from megatron_eagle.data.build.walk import Ledger, WalkedTar, names_text, unpack_gzip, walk_folder, walk_tar
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.pages import Ranges
from megatron_eagle.data.media.sniff import HEAD, sniff
from megatron_eagle.data.sample.conversation import Conversation
from megatron_eagle.errors import BrokenSample

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Item:
    """One sample to be.

    number: from 0, in the order of the source. place: where it stands there, for the list of rejected samples.
    claimed_id: whatever the record calls its id. content: its conversation, or the reason why it is rejected.
    root: folder that media names start from, None if all media lie in a tar file. slices: media by name, found already.
    weight: its share of the source, for the progress bar (bytes of a text file, 1 elsewhere). inline: bytes of media
    that the record held, by name. files: files of the source that it is made of. renamed: whether its id was made
    unique. documents: as in ``ReadRecord``.
    """

    number: int
    place: dict[str, Any]
    claimed_id: str | int | None
    content: Conversation | str
    root: Path | None
    slices: Mapping[str, FileSlice] = field(default_factory=dict)
    weight: int = 1
    inline: Mapping[str, bytes] = field(default_factory=dict)
    files: int = 0
    renamed: bool = False
    documents: Mapping[int, Ranges] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordSource:
    """One input of ``data build``: a file of records, a tar file, or a folder of media, of tar or of Parquet files.

    media_root: folder of a file's media, its own by default. prompt: the question that a mere caption answers.
    ignored: keys of records that are left out though nobody understands them.
    """

    path: Path
    media_root: Path | None = None
    prompt: str = DEFAULT_PROMPT
    ignored: frozenset[str] = frozenset()

    @property
    def rules(self) -> Rules:
        return Rules(self.prompt, Ignored(self.ignored))

    def _within(self, endings: tuple[str, ...]) -> list[Path]:
        names = sorted(path for path in self.path.iterdir() if path.name.endswith(endings))
        return [path for path in names if path.is_file() and not path.name.startswith(".")]

    @property
    def _tars(self) -> list[Path]:
        if self.path.is_dir():
            return self._within(TAR_ENDINGS)
        return [self.path] if container_of(self.path) in ("tar", "tar.gz") else []

    @property
    def _tables(self) -> list[Path]:
        """Parquet files of a folder."""
        return self._within((".parquet",)) if self.path.is_dir() else []

    def describe(self) -> dict[str, Any]:
        """What must be the same when a build is continued.

        Raises OSError if the source is not there, and UserError if it is of a kind that is not read.
        """
        self.path.stat()
        files = [self.path] if self.path.is_file() else self._tars or self._tables
        for file in files:
            container_of(file)
        sizes = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        root = None if self.media_root is None else str(self.media_root.absolute())
        source = {"source": str(self.path.absolute()), "files": sizes, "media_root": root, "prompt": self.prompt}
        return {**source, "ignored": sorted(self.ignored)} if self.ignored else source

    def size(self) -> int | None:
        """Sum of the weights, where it is known beforehand."""
        if not self.path.is_file() or container_of(self.path) != "text":
            return None
        with open(self.path, "rb") as file:
            return None if sniff(file.read(HEAD)).name == "gzip" else self.path.stat().st_size

    def items(self, scratch: Path, ledger: Ledger | None = None) -> Iterator[Item]:
        """Every sample in order; ids that repeat are made unique by the place of their sample.

        scratch: folder for what must be unpacked. ledger: counts the files of a folder or of tar files.
        """
        seen: set[str] = set()
        for item in self._read(scratch, Ledger() if ledger is None else ledger):
            if not isinstance(item.content, Conversation):
                yield item
                continue
            reason = _unstorable(item.content)
            if reason is not None:
                yield replace(item, content=reason)
                continue
            identity = _unique(item, item.content.id, seen)
            seen.add(identity)
            if identity != item.content.id:
                item = replace(item, content=replace(item.content, id=identity), renamed=True)
            yield item

    def _read(self, scratch: Path, ledger: Ledger) -> Iterator[Item]:
        tars = self._tars
        if tars:
            self._leave_strays(tars, "stray beside tar files", ledger)
            return _tar_items(tars, self.rules, scratch, ledger)
        if not self.path.is_dir():
            return self._records([self.path])
        if self._tables:
            self._leave_strays(self._tables, "stray beside Parquet files", ledger)
            return self._records(self._tables)
        return _folder_items(self.path, self.rules, ledger)

    def _leave_strays(self, read: list[Path], reason: str, ledger: Ledger) -> None:
        """Counts all files of a folder that are none of those read."""
        if not self.path.is_dir():
            return
        found = Ledger()
        own = {path.name for path in read}
        for file in walk_folder(self.path, found):
            if file.name not in own:
                found.leave(file.name, reason)
        ledger.files += found.files - len(own)
        for name, count in found.left.items():
            ledger.leave(found.examples[name], name, count)

    def _records(self, files: list[Path]) -> Iterator[Item]:
        number = 0
        for path in files:
            root = path.parent if self.media_root is None else self.media_root
            for found in read_records(path):
                if len(files) > 1:
                    found = replace(found, place={"table": path.name, **found.place}, name=f"{path.stem}/{found.name}")
                yield _record_item(number, found, root, self.rules)
                number += 1


def _record_item(number: int, found: FoundRecord, root: Path, rules: Rules) -> Item:
    content: Conversation | str
    inline: dict[str, bytes] = {}
    documents: dict[int, Ranges] = {}
    try:
        if found.reason is not None:
            raise BrokenSample(found.reason)
        read = read_record(found.record, rules, found.name)
        content, inline, documents = read.conversation, read.inline, read.documents
    except BrokenSample as error:
        content = str(error)
    claimed = _claimed_id(found.record)
    return Item(number, found.place, claimed, content, root, weight=found.weight, inline=inline, documents=documents)


def _unique(item: Item, identity: str, seen: set[str]) -> str:
    """The id, or if another sample has it, the id with its place; depends on what comes before it only."""
    where = "-".join(f"{name}-{part}" if isinstance(part, int) else str(part) for name, part in item.place.items())
    unique = identity
    while unique in seen:
        unique = f"{unique}@{where}"
    return unique


def _unstorable(conversation: Conversation) -> str | None:
    """Why a parsed conversation cannot be stored."""
    try:
        json.dumps(conversation.extra, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        return f"a field holds text that is not Unicode: {error.reason}"
    except ValueError:
        return "a field holds NaN or an infinite number, which JSON does not have"
    return None


def _claimed_id(record: Any) -> Any:
    """Whatever the record calls its id, as far as it can be listed."""
    claimed = record.get("id") if isinstance(record, dict) else None
    return claimed if isinstance(claimed, str | int) else None


def _folder_items(folder: Path, rules: Rules, ledger: Ledger) -> Iterator[Item]:
    found = walk_folder(folder, ledger)
    tables = [file.name for file in found if file.name.rpartition("/")[2] == METADATA]
    if tables:
        yield from _image_folder_items(folder, tables, {file.name for file in found}, rules, ledger)
        return
    groups = sorted(group_files(found), key=lambda group: group.key)
    claims = _claims(groups, rules)
    number = 0
    for group in groups:
        if not group.described:
            for name in [name for name in group.files if name in claims]:
                del group.files[name]
            if not group.size:
                continue
        item = _group_item(number, group, {"key": group.key}, group.key, folder, rules, ledger)
        yield replace(item, files=item.files + sum(owner == group.key for owner in claims.values()))
        number += 1


def _claims(groups: list[Group], rules: Rules) -> dict[str, str]:
    """Media without a text of their own that the record of another group shows: name -> key of that group."""
    bare = {name for group in groups if not group.described for name in group.files}
    claims: dict[str, str] = {}
    for group in groups if bare else ():
        if not any(ending_of(name) == "json" for name in group.files):
            continue
        try:
            shown = read_group(group, rules)[0].conversation
        except BrokenSample:
            continue
        for name in {os.path.normpath(name) for name in (*shown.images, *shown.videos)} & bare:
            claims.setdefault(name, group.key)
    return claims


def _image_folder_items(
    folder: Path, tables: list[str], names: set[str], rules: Rules, ledger: Ledger
) -> Iterator[Item]:
    """Hugging Face's image folder: records of every metadata.jsonl, whose files lie in its folder."""
    number, used = 0, set(tables)
    ledger.shared = len(tables)
    for table in tables:
        inside = os.path.dirname(table)
        for found in read_records(folder / table):
            found = replace(found, place={"table": table, **found.place})
            if len(tables) > 1:
                found = replace(found, name=f"{inside}/{found.name}")
            item = _record_item(number, found, folder / inside, rules)
            own = {os.path.normpath(os.path.join(inside, name)) for name in _named(item, found.record)} & names - used
            used |= own
            yield replace(item, files=len(own))
            number += 1
    for name in sorted(names - used):
        ledger.leave(name, f"not named in {METADATA}")


def _named(item: Item, record: Any) -> list[str]:
    """The files of a record of an image folder, also of one that is rejected."""
    if isinstance(item.content, Conversation):
        return [*item.content.images, *item.content.videos]
    name = record.get(FILE_NAME) if isinstance(record, dict) else None
    return [name] if isinstance(name, str) else []


def _tar_items(tars: list[Path], rules: Rules, scratch: Path, ledger: Ledger) -> Iterator[Item]:
    """Samples of tar files one after another; one that is cut off ends with a rejected sample that says so."""
    number = 0
    for tar in tars:
        # Keys need not differ from tar file to tar file.
        stem = next(tar.name.removesuffix(ending) for ending in (*TAR_ENDINGS, "") if tar.name.endswith(ending))
        prefix = f"{stem}/" if len(tars) > 1 else ""
        plain = tar if container_of(tar) != "tar.gz" else unpack_gzip(tar, scratch)
        walked = walk_tar(plain, ledger)
        groups = group_files(walked.files)
        broken = _cut_off(groups, walked)
        for group in groups:
            if group is not broken:
                place = {"tar": tar.name, "key": group.key}
                yield _group_item(number, group, place, prefix + group.key, None, rules, ledger)
                number += 1
        if walked.damage is not None:
            after = f" after the first file of {broken.key}" if broken is not None else ""
            reason = f"{tar.name} is cut off or damaged{after}: {walked.damage}"
            files = broken.size if broken is not None else 0
            yield Item(number, {"tar": tar.name}, None, reason, None, files=files)
            number += 1


def _cut_off(groups: list[Group], walked: WalkedTar) -> Group | None:
    """The group that reading ended in, part of which may be missing."""
    if walked.damage is None:
        return None
    return next((group for group in groups if walked.after in group.names), None)


def _group_item(
    number: int, group: Group, place: dict[str, Any], name: str, root: Path | None, rules: Rules, ledger: Ledger
) -> Item:
    record: Any = None
    content: Conversation | str
    inline: dict[str, bytes] = {}
    documents: dict[int, Ranges] = {}
    files = group.size
    # A file goes by its path, and by what follows the key in it unless that is another one's path.
    slices = {**{file.partition(f"{group.key}.")[2]: part for file, part in group.files.items()}, **group.files}
    try:
        record = json_of(group)
        read, unnamed = read_group(group, rules, name, record)
        content, inline, documents = read.conversation, read.inline, read.documents
        files -= len(unnamed)
        ledger.leave(unnamed[0] if unnamed else "", "not named by its record", len(unnamed))
    except BrokenSample as error:
        content = str(error)
    return Item(
        number, place, _claimed_id(record), content, root, slices, inline=inline, files=files, documents=documents
    )


def locate(item: Item, name: str, what: str) -> FileSlice:
    """Where a medium lies; paths that lead out of the root, absolute or by "..", are refused. Raises BrokenSample."""
    if name in item.slices:
        return item.slices[name]
    shown = shorten(name)
    if item.root is None:
        raise BrokenSample(f"{what} {shown} is not among the files of its sample: {names_text(list(item.slices))}")
    if "\0" in name:
        raise BrokenSample(f"{what} path {shorten(repr(name))} holds a NUL character")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can say it, UTF-8 cannot
        raise BrokenSample(f"{what} path {shorten(repr(name))} is no text that a file's name can be") from None
    root = os.path.abspath(item.root)
    path = os.path.abspath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        raise BrokenSample(f"{what} {shown} lies outside of the media root {root}")
    try:
        return FileSlice.whole(Path(path))
    except FileNotFoundError:
        raise BrokenSample(f"{what} {shown} is missing") from None
    except OSError as error:
        raise BrokenSample(f"{what} {shown} cannot be read: {error.strerror}") from error


def spool(items: Iterable[Item], file: Path) -> Iterator[Item]:
    """Items whose inline media lie in a file, so that a block of them is small; the file is made only if needed."""
    for item in items:
        if not item.inline:
            yield item
            continue
        slices = dict(item.slices)
        with open(file, "ab") as spooled:
            for name, data in item.inline.items():
                slices[name] = FileSlice(file, spooled.tell(), len(data))
                spooled.write(data)
        yield replace(item, inline={}, slices=slices)
