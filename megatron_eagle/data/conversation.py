"""A conversation: from a ShareGPT/LLaVA record, checked, to ChatML token ids and labels.

Records look like ``{"id": ..., "image": "a.png" or [...], "conversations": [{"from": "human", "value": "..."}]}``.
``<image>`` in a text says where an image is shown, in the order of the list; a record without any marker shows its
images before the first human turn (the LLaVA and InternVL rule); any other difference between markers and images is
an error, never a guess. Tokens follow Eagle (NVlabs/Eagle, ``Eagle2_5/eaglevl/train``): ChatML, turn texts stripped,
loss on the assistant's words and the <|im_end|> after them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_eagle.data.batch import IGNORE_LABEL
from megatron_eagle.data.broken import BrokenSample
from megatron_eagle.data.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant", "observation"]
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "observation",
}
MARKER = "<image>"
DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """A checked conversation: exactly one ``<image>`` marker per image, none of them in the assistant's words.

    id: the record's id as a string.
    images: one name per image, in the order of the markers (a path in a JSONL file, an entry's name in a shard).
    turns: at least one; a system turn can only be the first.
    extra: the record's other fields, kept as they are (a task's name, a source, ...).
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not any(turn.role != "system" for turn in self.turns):
            raise BrokenSample("empty conversation: no turn in it")
        for number, turn in enumerate(self.turns, 1):
            if turn.role == "system" and number > 1:
                raise BrokenSample(f"turn {number} is from system, only the first turn can be")
            if turn.role == "assistant" and MARKER in turn.text:
                raise BrokenSample(f"turn {number}, from gpt/assistant, holds an {MARKER} marker")
        markers = sum(turn.text.count(MARKER) for turn in self.turns)
        if markers != len(self.images):
            relation = "more" if markers > len(self.images) else "fewer"
            raise BrokenSample(f"{relation} {MARKER} markers than images: {markers} markers, {len(self.images)} images")

    def to_record(self, images: Sequence[str]) -> dict[str, Any]:
        """The record that ``parse_record`` reads back as this conversation, with other names for its images."""
        turns = [{"from": turn.role, "value": turn.text} for turn in self.turns]
        return {**self.extra, "id": self.id, "image": list(images), "conversations": turns}


def parse_record(record: Any, *, default_id: str | None = None) -> Conversation:
    """Checks a decoded JSON record; raises BrokenSample with the reason.

    default_id: stands in for a missing id; without it a record must have one.
    """
    if not isinstance(record, dict):
        raise BrokenSample(f"record is a JSON {type(record).__name__}, not an object")
    turns = [_parse_turn(turn, number) for number, turn in enumerate(_list_of_turns(record), 1)]
    images = _parse_images(record.get("image"))
    extra = {name: value for name, value in record.items() if name not in ("id", "image", "conversations")}
    turns = _place_images(turns, len(images))
    conversation = Conversation(record_id(record, default_id), images, tuple(turns), extra)
    if not any(turn.role == "assistant" for turn in turns):
        raise BrokenSample("nothing to learn: no turn from gpt/assistant")
    return conversation


def record_id(record: Any, default: str | None = None) -> str:
    """The record's id as a string, or ``default``; raises BrokenSample if there is neither."""
    value = record.get("id") if isinstance(record, dict) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value:
        return _valid_unicode(value, "id")
    if value is None and default is not None:
        return default
    raise BrokenSample("record has no id" if value is None else f"id is neither text nor a whole number: {value!r}")


def _list_of_turns(record: dict[str, Any]) -> list[Any]:
    turns = record.get("conversations")
    if turns is None:
        raise BrokenSample("empty conversation: no field 'conversations'")
    if not isinstance(turns, list):
        raise BrokenSample(f"'conversations' is a {type(turns).__name__}, not a list")
    return turns


def _parse_turn(turn: Any, number: int) -> Turn:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BrokenSample(f"turn {number} has no 'from' and 'value'")
    name, text = turn["from"], turn["value"]
    if not isinstance(name, str) or name not in ROLES:
        raise BrokenSample(f"turn {number} is from {name!r}; known are {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise BrokenSample(f"turn {number} has a {type(text).__name__} as its value, not text")
    return Turn(ROLES[name], _valid_unicode(text.strip(), f"turn {number}"))


def _valid_unicode(text: str, where: str) -> str:
    """JSON can spell half a character (a lone surrogate), which is no text and cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BrokenSample(f"{where} is not valid Unicode (a lone surrogate)") from None
    return text


def _parse_images(value: Any) -> tuple[str, ...]:
    names = [] if value is None or value == "" else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BrokenSample(f"'image' is neither a path nor a list of paths: {value!r}")
    return tuple(names)


def _place_images(turns: list[Turn], images: int) -> list[Turn]:
    """Without any marker, all images go before the first human turn's text."""
    if not images or any(MARKER in turn.text for turn in turns):
        return turns
    for number, turn in enumerate(turns):
        if turn.role == "user":
            text = (f"{MARKER}\n" * images + turn.text).strip()
            return [*turns[:number], Turn("user", text), *turns[number + 1 :]]
    return turns


@dataclass
class EncodedConversation:
    """tokens, labels: int64 [n], labels not shifted; tile_slots: int64 [t], position of each tile's first token."""

    tokens: Tensor
    labels: Tensor
    tile_slots: Tensor


def encode_conversation(
    conversation: Conversation,
    tokenizer: Tokenizer,
    tiles: Sequence[int],
    tokens_per_tile: int,
    system: str = DEFAULT_SYSTEM,
) -> EncodedConversation:
    """Token ids and labels of a whole conversation.

    tiles: tiles of each image, thumbnail included.
    system: text of the system turn of a conversation that brings none; empty for no such turn.
    """
    writer = _Writer(tokenizer, tiles, tokens_per_tile)
    writer.turns(conversation.turns, system)
    return writer.finish()


def encode_prompt(
    conversation: Conversation,
    tokenizer: Tokenizer,
    tiles: Sequence[int],
    tokens_per_tile: int,
    system: str = DEFAULT_SYSTEM,
) -> EncodedConversation:
    """What a model reads before it writes the next answer: the turns, without the assistant's last one if the
    conversation ends with it, and the header of an answer.

    It is exactly the beginning of what ``encode_conversation`` gives; no label is learned.
    """
    ends_with_answer = conversation.turns[-1].role == "assistant"
    writer = _Writer(tokenizer, tiles, tokens_per_tile)
    writer.turns(conversation.turns[:-1] if ends_with_answer else conversation.turns, system)
    writer.header("assistant")
    prompt = writer.finish()
    return EncodedConversation(prompt.tokens, torch.full_like(prompt.labels, IGNORE_LABEL), prompt.tile_slots)


class _Writer:
    """Appends ChatML: ``<|im_start|>ROLE\nTEXT<|im_end|>\n``, with images in place of their markers."""

    def __init__(self, tokenizer: Tokenizer, tiles: Sequence[int], tokens_per_tile: int) -> None:
        self._tokenizer = tokenizer
        self._tiles = tiles
        self._tokens_per_tile = tokens_per_tile
        self._images = 0
        self._tokens: list[int] = []
        self._labels: list[int] = []
        self._slots: list[int] = []

    def _append(self, ids: list[int], learned: bool = False) -> None:
        self._tokens += ids
        self._labels += ids if learned else [IGNORE_LABEL] * len(ids)

    def turns(self, turns: Sequence[Turn], system: str) -> None:
        """All turns; if they bring no system turn, one of the text ``system``, if any, before them."""
        if system and (not turns or turns[0].role != "system"):
            turns = [Turn("system", system), *turns]
        for turn in turns:
            self.header(turn.role)
            self._content(turn.text, learned=turn.role == "assistant")

    def header(self, role: Role) -> None:
        self._append([self._tokenizer.im_start, *self._tokenizer.encode(f"{role}\n")])

    def _content(self, text: str, *, learned: bool) -> None:
        # An image always ends with one newline of its own, so the one that usually follows a marker is taken with it.
        first, *rest = re.split(f"{MARKER}\n?", text)
        piece = first
        for following in rest:
            # Images are numbered when there are several (NVlabs/Eagle's training data preparation).
            number = f"<image {self._images + 1}>" if len(self._tiles) > 1 else ""
            self._append(self._tokenizer.encode(piece + number), learned)
            self._image()
            piece = f"\n{following}"
        self._append(self._tokenizer.encode(piece), learned)
        self._append([self._tokenizer.im_end], learned)
        self._append(self._tokenizer.encode("\n"))

    def _image(self) -> None:
        tiles = self._tiles[self._images]
        self._images += 1
        self._append([self._tokenizer.image_start])
        start = len(self._tokens)
        self._slots += [start + tile * self._tokens_per_tile for tile in range(tiles)]
        self._append([self._tokenizer.image_context] * (tiles * self._tokens_per_tile))
        self._append([self._tokenizer.image_end])

    def finish(self) -> EncodedConversation:
        if self._images != len(self._tiles):
            raise ValueError(f"{self._images} images were shown, {len(self._tiles)} were given")
        return EncodedConversation(
            *(torch.tensor(x, dtype=torch.int64) for x in (self._tokens, self._labels, self._slots))
        )
