r"""Marks in a turn's text: which ones say where media are shown, which only look like it, and how to write one as text.

``<image>`` and ``<video>`` show the next medium, Eagle's ``<image-2>`` the second of its list (NVlabs/Eagle,
``Eagle2_5/document/2.preparing_playground.md``). A mark that other frameworks use (``<image1>``, ``<ImageHere>``,
``<|vision_start|>``, ...) is a lookalike: beside media it most likely says where one belongs, so nobody may read it as
mere words. ``<document>`` and ``<document-2>`` are marks of a record with documents only; when a data set is built they
become the ``<image>`` of every page. An odd number of backslashes before any of these makes it words: ``\<image>`` is
read as ``<image>``, ``\\\<image>`` as ``\<image>``. Lookalikes and their backslashes mean nothing where no media are.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

MARKER = "<image>"
VIDEO_MARKER = "<video>"
Kind = Literal["image", "video", "document"]
MARKERS: dict[Kind, str] = {"image": MARKER, "video": VIDEO_MARKER}  # of a shard's texts

_STEM = r"(?:image|img|video|vid|vision|media|图片|图像|视频)s?"
_TAIL = (
    r"(?:here|placeholder|pad|tokens?|context|patch|start|end|begin|soft[\s_-]?token|embeds?|features?|sep|newline|tag"
    r"|file|marker|mask)?"
)
_GAP = r"[\s_:#.-]*"
# Case is looked at only where it tells a mark of the form from a lookalike.
_LOOKALIKES = (
    rf"(?i:<\s*\|?\s*(?:start_of_|end_of_|begin_of_)?{_STEM}{_GAP}{_TAIL}{_GAP}\d*\s*\|?\s*/?\s*>)"
    rf"|(?i:<\|?(?:picture|pic|figure|photo|frame)s?{_GAP}\d+\|?>)"
    r"|<im_(?:start|end|patch|newline)>|<__media__>"
    r"|\[(?:IMG|IMAGE|VIDEO)(?:_BREAK|_END)?\]"
    r"|&lt;(?:image|video)(?:-\d+)?&gt;"
)


def _marks(kinds: str) -> re.Pattern[str]:
    return re.compile(rf"(?P<plain><(?:{kinds})>)|(?P<numbered><(?:{kinds})-\d+>)|{_LOOKALIKES}")


_MARKS, _MARKS_WITH_DOCUMENTS = _marks("image|video"), _marks("image|video|document")


@dataclass(frozen=True)
class Mark:
    """A mark in a text.

    text: the mark alone. start, end: its place, with the backslashes before it. backslashes: how many those are.
    kind: of what it shows, None for a lookalike. number: i of ``<image-i>``, else None.
    """

    text: str
    start: int
    end: int
    backslashes: int
    kind: Kind | None
    number: int | None

    @property
    def escaped(self) -> bool:
        """Whether it is meant as words."""
        return self.backslashes % 2 == 1

    @property
    def shows(self) -> bool:
        """Whether a medium is shown here."""
        return self.kind is not None and not self.escaped


def find_marks(text: str, *, documents: bool = False) -> Iterator[Mark]:
    """All marks of a text, escaped ones and lookalikes among them, from left to right.

    documents: whether ``<document>`` is one.
    """
    for match in (_MARKS_WITH_DOCUMENTS if documents else _MARKS).finditer(text):
        start = match.start()
        while start and text[start - 1] == "\\":
            start -= 1
        found = match.group()
        kind: Kind | None = None
        if match["plain"] or match["numbered"]:
            kind = "image" if found.startswith("<image") else "video" if found.startswith("<video") else "document"
        number = int(found[found.index("-") + 1 : -1]) if match["numbered"] else None
        yield Mark(found, start, match.end(), match.start() - start, kind, number)


def cut_at_markers(text: str, *, media: bool) -> list[str]:
    """Words, marker, words, marker, ..., words of a stored text, with ``<image>`` and ``<video>`` as markers.

    Words are as the model reads them, without the backslashes that made a mark words. media: whether the conversation
    has any; only then are lookalikes marks. Numbered marks are words here: building a data set has replaced them.
    """
    pieces, words, done = [], "", 0
    for mark in find_marks(text):
        words += text[done : mark.start]
        done = mark.end
        if mark.escaped and (mark.kind is not None or media):
            words += "\\" * (mark.backslashes // 2) + mark.text
        elif mark.kind is None or mark.number is not None or mark.escaped:
            words += text[mark.start : mark.end]
        else:
            pieces += [words + "\\" * mark.backslashes, mark.text]
            words = ""
    return [*pieces, words + text[done:]]


def count_markers(text: str, kind: Kind) -> int:
    """Media of a kind that a stored text shows."""
    return cut_at_markers(text, media=False)[1::2].count(MARKERS[kind])


def rename_markers(text: str, name: Callable[[Mark], str], *, documents: bool = False) -> str:
    """The text with other words for every mark that shows a medium; backslashes before it stay.

    documents: whether ``<document>`` is a mark; an escaped one loses its backslash, for none is a mark afterwards.
    """
    written, done = "", 0
    for mark in find_marks(text, documents=documents):
        if mark.escaped and mark.kind == "document":
            written += text[done : mark.start] + "\\" * (mark.backslashes // 2) + mark.text
            done = mark.end
        if mark.shows:
            written += text[done : mark.end - len(mark.text)] + name(mark)
            done = mark.end
    return written + text[done:]


def escape_marks(text: str) -> str:
    """The text with every mark in it as words: what ``cut_at_markers`` reads back as ``text`` beside media."""
    written, done = "", 0
    for mark in find_marks(text):
        written += text[done : mark.start] + "\\" * (2 * mark.backslashes + 1) + mark.text
        done = mark.end
    return written + text[done:]
