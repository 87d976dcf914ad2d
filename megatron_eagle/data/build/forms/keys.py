"""Which keys of a record are understood, which say nothing that is shown, and what becomes of all others.

A key that nobody understands may hold half of the sample, so it is an error that names it, unless the user says what to
ignore (``--ignore-keys``).
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_eagle.data.build.forms.draft import shorten
from megatron_eagle.data.media.file_slice import VIDEO_ENDINGS
from megatron_eagle.data.sample.conversation import CONTENT_FIELDS
from megatron_eagle.errors import BrokenSample

ALL = "all"
# About a sample, not of it: kept beside the conversation, never shown. ("task" groups the answers of an evaluation.)
HARMLESS = frozenset({
    "id", "uid", "uuid", "idx", "index", "key", "task", "task_type", "dataset", "dataset_name", "data_source",
    "dataset_source", "source", "source_id", "origin", "subset", "split", "license", "licence", "copyright", "author",
    "annotator", "language", "lang", "locale", "category", "categories", "subcategory", "topic", "subtopic", "domain",
    "subject", "field", "tag", "tags", "label_type", "metadata", "meta", "info", "score", "scores", "quality",
    "difficulty", "rating", "width", "height", "length", "duration", "num_frames", "fps", "size", "model", "generator",
    "created", "created_at", "timestamp", "date", "version", "revision", "note", "notes", "comment", "comments",
    "question_id", "question_type", "answer_type", "image_id", "video_id", "ann_id", "annotation_id",
    "conversation_id", "sha256", "md5", "hash",
})  # fmt: skip
# Within what is about a sample, these would be turns in the wrong place.
TURN_FIELDS = frozenset({"content", "value", "query", "response", "instruction", "output", "human", "assistant"})
HARMLESS_IN_TURN = frozenset({"id", "turn_id", "index", "timestamp"})
MEDIA_ENDINGS = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "jfif",
    "avif",
    "heic",
    "pdf",
    *VIDEO_ENDINGS,
)
_MEDIUM = re.compile(rf"(?i)(data:(?:image/|video/|application/pdf)|[^\n]{{1,4096}}\.(?:{'|'.join(MEDIA_ENDINGS)})\Z)")


@dataclass(frozen=True)
class Ignored:
    """Keys that the user wants to be ignored; ``all``: every one that is not understood."""

    names: frozenset[str] = frozenset()

    @property
    def all(self) -> bool:
        return ALL in self.names

    def without(self, given: Mapping[str, Any], keep: Collection[str] = ()) -> dict[str, Any]:
        """The keys that are looked at: not None, and not to be ignored."""
        return {
            name: value
            for name, value in given.items()
            if name in keep or (value is not None and name not in self.names)
        }

    def check_keys(self, given: Mapping[str, Any], known: Collection[str], where: str) -> None:
        """Raises BrokenSample for the first key that says something and is not known."""
        for name, value in given.items():
            if name not in known and name not in self.names and not self.all and not says_nothing(value):
                close = difflib.get_close_matches(str(name).lower(), sorted(known), 1, 0.7)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise BrokenSample(
                    f"{where}: key {shorten(name)!r} is not understood{hint}; --ignore-keys leaves it out"
                )


def says_nothing(value: Any) -> bool:
    """Whether a value is there for the sake of its key only, as in a table with a column for everything."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def check_kept(value: Any, key: str, where: str, shown: Collection[str] = ()) -> None:
    """Raises BrokenSample if a value that is kept, but not shown, holds a medium or turns.

    shown: paths of media that are shown; to name those again is fine.
    """
    names = {path.rpartition("/")[2] for path in shown}
    for path, part in _walk(value, key):
        if path.rpartition(".")[2].lower() in CONTENT_FIELDS | TURN_FIELDS and path != key and not says_nothing(part):
            raise BrokenSample(f"{where}: {shorten(path)!r} is not read there; --ignore-keys {key} leaves it out")
        if isinstance(part, bytes):
            raise BrokenSample(f"{where}: {shorten(path)!r} holds {len(part)} bytes, which are not shown")
        if isinstance(part, str) and _MEDIUM.match(part) and part.rpartition("/")[2] not in names:
            raise BrokenSample(
                f"{where}: {shorten(path)!r} names a medium that is not shown: {shorten(part)}; "
                f"--ignore-keys {key} keeps it as it is"
            )


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, value
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _walk(part, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _walk(part, path)
