"""What every form of record is read into, before its media are set in place: turns, media, and what they said."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_eagle.data.media.frames import Stretch
from megatron_eagle.data.media.pages import Ranges
from megatron_eagle.data.sample.conversation import Role
from megatron_eagle.data.sample.markers import Kind

SHOWN = 100  # characters of a value in a reason


@dataclass(frozen=True)
class Medium:
    """One image, video or document of a record: a path, or the bytes that the record holds itself.

    stretch: of a video that is a clip of its file. pages: of a document, all if there are none.
    """

    kind: Kind
    path: str = ""
    data: bytes | None = None
    stretch: Stretch | None = None
    pages: Ranges = ()


@dataclass(frozen=True)
class Slot:
    """A part that says "here an image" without saying which: the next of the record's list, or that of ``number``."""

    kind: Kind
    number: int | None = None


Piece = str | Medium | Slot


@dataclass(frozen=True)
class Said:
    """One turn as its form has it.

    pieces: its text and the media set among it. own: media that the turn lists beside its text.
    """

    role: Role
    pieces: tuple[Piece, ...]
    learned: bool = True
    own: tuple[Medium, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A record as its form has it.

    media: the record's own list. fills: media without a marker go before the first question even if others have one
    (Eagle's rule). extra: what is kept beside the conversation.
    """

    said: tuple[Said, ...]
    media: tuple[Medium, ...] = ()
    fills: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


def shorten(value: object, most: int = SHOWN) -> str:
    """A value for a reason: its first characters, and how many it has if that is not all."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
