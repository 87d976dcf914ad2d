"""Files of a folder or a tar -> groups, one for each sample.

A WebDataset groups files whose names agree up to the first dot. Names such as ``page 1.0.jpg`` and ``page 1.5.jpg``
have dots of their own, so a group is taken apart where that is what it holds: files whose names agree up to the last
dot belong together; a medium without a text of its own belongs to the longest name before one of its dots that has one
(``7.0.png`` to ``7.json``); and only if no other reading is possible is everything up to the first dot one sample.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.errors import BrokenSample

TEXT_ENDINGS = ("txt", "json")


@dataclass(frozen=True)
class FoundFile:
    """A file of a source, by its path there; refused: why it cannot be read."""

    name: str
    part: FileSlice | None
    refused: str | None = None

    @property
    def ending(self) -> str:
        return ending_of(self.name)


@dataclass
class Group:
    """Files of one sample: key, and name -> where its bytes are, in the order they were found.

    refused: reasons why some cannot be read, by name.
    """

    key: str
    files: dict[str, FileSlice] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.files) + len(self.refused)

    @property
    def names(self) -> list[str]:
        return [*self.files, *self.refused]

    @property
    def described(self) -> bool:
        """Whether it has a text."""
        return any(ending_of(name) in TEXT_ENDINGS for name in self.names)

    def read(self, ending: str) -> bytes | None:
        """The file of this ending, or None if there is none; raises BrokenSample if there are several."""
        names = [name for name in self.files if ending_of(name) == ending]
        if len(names) > 1:
            raise BrokenSample(f"several texts: {', '.join(names)}")
        if not names:
            return None
        try:
            return self.files[names[0]].read()
        except OSError as error:
            raise BrokenSample(f"{names[0]} cannot be read: {error.strerror}") from error


def ending_of(name: str) -> str:
    """What follows the last dot of a file's name."""
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def group_files(files: Iterable[FoundFile]) -> list[Group]:
    """Groups in the order in which their first files come."""
    first: dict[str, list[FoundFile]] = {}
    for file in files:
        first.setdefault(_first_key(file.name), []).append(file)
    order = {file.name: number for number, file in enumerate(file for group in first.values() for file in group)}
    groups = [group for key, members in first.items() for group in _split(key, members)]
    return sorted(groups, key=lambda group: min(order[name] for name in group.names))


def _first_key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}".removeprefix("/")


def _last_key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.rpartition('.')[0] or base}".removeprefix("/")


def _split(key: str, members: Sequence[FoundFile]) -> list[Group]:
    stems: dict[str, list[FoundFile]] = {}
    for file in members:
        stems.setdefault(_last_key(file.name), []).append(file)
    joined = _join_texts(key, stems)
    if len(joined) == 1:
        return [_made(key, members)]
    return [_made(stem, files) for stem, files in joined.items()]


def _made(key: str, files: Sequence[FoundFile]) -> Group:
    group = Group(key)
    for file in files:
        if file.part is not None and file.refused is None:
            group.files[file.name] = file.part
        else:
            group.refused[file.name] = file.refused or "cannot be read"
    return group


def _count(files: Sequence[FoundFile], *endings: str) -> int:
    return sum(file.ending in endings for file in files)


def _join_texts(key: str, stems: dict[str, list[FoundFile]]) -> dict[str, list[FoundFile]]:
    """The same files with every stem that lacks something joined to the one that has it."""
    joined = {stem: list(files) for stem, files in stems.items()}
    for stem, files in stems.items():
        described, media = _count(files, *TEXT_ENDINGS), len(files) - _count(files, *TEXT_ENDINGS)
        if described and (media or _count(files, "json")):
            continue
        owner = _owner(stem, stems)
        if owner is None or (described and _count(joined[owner], "txt")):
            continue
        joined[owner] += joined.pop(stem)
    bare = [stem for stem, files in joined.items() if not _count(files, *TEXT_ENDINGS)]
    loose = [stem for stem, files in joined.items() if _count(files, *TEXT_ENDINGS) == len(files)]
    texts = [file for stem in loose for file in joined[stem]]
    complete = len(joined) > len(bare) + len(loose)
    if bare and loose and not complete and _count(texts, "txt") <= 1 and _count(texts, "json") <= 1:
        return {key: [file for files in joined.values() for file in files]}
    return joined


def _owner(stem: str, stems: dict[str, list[FoundFile]]) -> str | None:
    """The longest stem with a text of which ``stem`` is a part."""
    folder, slash, base = stem.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        candidate = f"{folder}{slash}{base}"
        if _count(stems.get(candidate, ()), *TEXT_ENDINGS):
            return candidate
    return None
