"""What is asked and what comes back: messages of words, pictures and videos; options; the pieces of an answer.

Plain data, without torch: the command line, the endpoint and the page make it, ``answerer.py`` reads it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_eagle.errors import UserError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Medium:
    """A picture or a video as its file's bytes; name: what whoever gave it calls it."""

    kind: Literal["image", "video"]
    name: str
    data: bytes


@dataclass(frozen=True)
class Message:
    """One turn: texts and media in the order in which the model reads them."""

    role: Role
    content: tuple[str | Medium, ...]

    @property
    def media(self) -> tuple[Medium, ...]:
        return tuple(part for part in self.content if isinstance(part, Medium))


def question(text: str, media: Sequence[Medium] = (), system: str | None = None) -> list[Message]:
    """One question about ``media``, which come first, as in training. system: None leaves the model its own."""
    asked = Message("user", (*media, text))
    return [asked] if system is None else [Message("system", (system,)), asked]


@dataclass(frozen=True)
class Options:
    """How an answer is drawn. temperature: 0 takes the likeliest token each time. seed: of the draw, None for any."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < 100 or not 0 < self.top_p <= 1:
            raise UserError(
                f"an answer needs at least 1 token, a temperature from 0 to 100 and a top_p above 0 and up to 1; these "
                f"are {self.max_new_tokens}, {self.temperature} and {self.top_p}"
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise UserError(f"a seed has 64 bits, with its sign; this one needs {self.seed.bit_length() + 1}")


@dataclass(frozen=True)
class Shown:
    """One picture, or frame of a video, as the model saw it.

    tiles: uint8 [n, 3, side, side], row by row of a grid of (columns, rows); one more is the thumbnail, which is last.
    """

    name: str
    size: tuple[int, int]
    grid: tuple[int, int]
    tiles: Any


@dataclass(frozen=True)
class Finished:
    """The end of an answer; reason: ``length`` if the model was still speaking at the limit of tokens."""

    reason: Literal["stop", "length"]
    prompt_tokens: int
    answer_tokens: int


Event = str | tuple[Shown, ...] | Finished | Exception
"""Of one answer, in order: what the model saw, pieces of text, the end; or an error, after which nothing comes."""

Say = Callable[[Event], None]
"""Takes the events of one answer, from the thread that makes them."""
