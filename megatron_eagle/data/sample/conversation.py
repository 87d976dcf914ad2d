"""A conversation: from a ShareGPT/LLaVA record, checked, to ChatML token ids and labels.

Records look like ``{"id": ..., "image": "a.png" or [...], "conversations": [{"from": "human", "value": "..."}]}``, with
"video" like "image". ``<image>`` in a text says where an image is shown, ``<video>`` where a video is, in the order of
the lists; a record without any marker shows its images and videos before the first human turn (the LLaVA and InternVL
rule), and one of videos alone may call them ``<image>`` (LLaVA-Video does); any other difference between markers and
media is an error, never a guess. This is the form that shards hold; ``data/build/forms`` reads the field's other forms
into it. Tokens follow Eagle (NVlabs/Eagle, ``Eagle2_5/eaglevl/train``): ChatML, turn texts stripped, loss on the
assistant's words and the <|im_end|> after them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_eagle.config.reading import DEFAULT_SYSTEM
from megatron_eagle.data.media.frames import Stretch
from megatron_eagle.data.sample.markers import (
    MARKER,
    MARKERS,
    VIDEO_MARKER,
    Kind,
    count_markers,
    cut_at_markers,
    rename_markers,
)
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.errors import BrokenSample

Role = Literal["system", "user", "assistant", "observation"]
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "observation",
}
NUMBERS: dict[Kind, str] = {"image": "image_numbers", "video": "video_numbers"}
DOCUMENTS = "image_documents"
# Fields that hold turns or media in some form. Nobody may take them for a record's other fields.
CONTENT_FIELDS = frozenset({
    "image", "images", "image_list", "image_path", "image_url", "image_file", "video", "videos", "video_list",
    "video_path", "video_url", "data", "messages", "conversation", "conversations", "system", "system_prompt", "tools",
    "tool_calls", "functions", "audio", "audios", "document", "documents", "history",
})  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """learned: whether an answer is learned; one that is not is read as context. Other turns never are."""

    role: Role
    text: str
    learned: bool = True


@dataclass(frozen=True)
class Conversation:
    """A checked conversation: one ``<image>`` marker per image, one ``<video>`` per video, none in an assistant's turn.

    id: the record's id as a string.
    images: one name per image, in the order of the markers (a path in a JSONL file, an entry's name in a shard).
    turns: at least one; a system turn can only be the first.
    extra: the record's other fields, kept as they are (a task's name, a source, ...).
    videos: as images.
    image_numbers, video_numbers: number, from 1, of each in the list it came from, which is what the model reads of it;
        empty if they are 1, 2, 3, ... The same number is the same medium, shown again.
    video_clips: start and end of each video that is a clip of its file; empty if none is.
    image_documents: of each image that is a page, which of the documents shown it belongs to, from 1, and 0 of others;
        empty if there are none.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    videos: tuple[str, ...] = ()
    image_numbers: tuple[int, ...] = ()
    video_numbers: tuple[int, ...] = ()
    video_clips: tuple[Stretch | None, ...] = ()
    image_documents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not any(turn.role != "system" for turn in self.turns):
            raise BrokenSample("empty conversation: no turn in it")
        for number, turn in enumerate(self.turns, 1):
            if turn.role == "system" and number > 1:
                raise BrokenSample(f"turn {number} is from system, only the first turn can be")
            for kind, marker in MARKERS.items():
                if turn.role == "assistant" and count_markers(turn.text, kind):
                    raise BrokenSample(
                        f"turn {number}, from gpt/assistant, holds an {marker} marker (the word itself: \\{marker})"
                    )
        for kind, marker in MARKERS.items():
            what, names, numbers = f"{kind}s", self.names(kind), self.numbers(kind)
            markers = sum(count_markers(turn.text, kind) for turn in self.turns)
            if markers != len(names):
                relation = "more" if markers > len(names) else "fewer"
                raise BrokenSample(f"{relation} {marker} markers than {what}: {markers} markers, {len(names)} {what}")
            if len(numbers) != len(names) or any(number < 1 for number in numbers):
                raise BrokenSample(f"{len(names)} {what} cannot have the numbers {list(numbers)[:8]}")
            if len(set(zip(numbers, names, strict=True))) != len(set(numbers)):
                raise BrokenSample(f"{what} of one number have several names: {list(numbers)[:8]}")
        if len(self.video_clips) not in (0, len(self.videos)):
            raise BrokenSample(f"{len(self.videos)} videos and {len(self.video_clips)} clips")
        if len(self.image_documents) not in (0, len(self.images)) or any(one < 0 for one in self.image_documents):
            raise BrokenSample(f"{len(self.images)} images cannot be of the documents {list(self.image_documents)[:8]}")

    def names(self, kind: Kind) -> tuple[str, ...]:
        """The names of all media of a kind, in the order of their markers."""
        return self.images if kind == "image" else self.videos

    def numbers(self, kind: Kind) -> tuple[int, ...]:
        """The number of each medium of a kind in the list it came from, from 1."""
        given = self.image_numbers if kind == "image" else self.video_numbers
        return given or tuple(range(1, len(self.names(kind)) + 1))

    @property
    def media(self) -> list[tuple[Kind, int]]:
        """Kind and number within its kind of every image and video, in the order of the markers."""
        counts: dict[Kind, int] = {"image": 0, "video": 0}
        found: list[tuple[Kind, int]] = []
        for turn in self.turns:
            for marker in cut_at_markers(turn.text, media=True)[1::2]:
                kind: Kind = "image" if marker == MARKER else "video"
                found.append((kind, counts[kind]))
                counts[kind] += 1
        return found

    def before(self, end: int) -> "Conversation":
        """The first ``end`` turns with the media they show."""
        turns = self.turns[:end]
        shown = {kind: sum(count_markers(turn.text, kind) for turn in turns) for kind in MARKERS}
        return replace(
            self,
            turns=turns,
            images=self.images[: shown["image"]],
            videos=self.videos[: shown["video"]],
            image_numbers=self.image_numbers[: shown["image"]],
            video_numbers=self.video_numbers[: shown["video"]],
            video_clips=self.video_clips[: shown["video"]],
            image_documents=self.image_documents[: shown["image"]],
        )

    def to_record(self, images: Sequence[str], videos: Sequence[str] = ()) -> dict[str, Any]:
        """The record that ``parse_record`` reads back as this conversation, with other names for its media."""
        turns = [
            {"from": turn.role, "value": turn.text, **({} if turn.learned else {"loss": False})} for turn in self.turns
        ]
        clips = self.video_clips or (None,) * len(videos)
        films = [name if clip is None else _clip_record(name, clip) for name, clip in zip(videos, clips, strict=True)]
        media: dict[str, Any] = {"image": list(images), **({"video": films} if films else {})}
        if self.image_documents:
            media[DOCUMENTS] = list(self.image_documents)
        for kind, name in NUMBERS.items():
            given = self.image_numbers if kind == "image" else self.video_numbers
            if given and given != tuple(range(1, len(given) + 1)):
                media[name] = list(given)
        return {**self.extra, "id": self.id, **media, "conversations": turns}


def parse_record(record: Any, *, default_id: str | None = None) -> Conversation:
    """Checks a decoded JSON record of a shard; raises BrokenSample with the reason.

    default_id: stands in for a missing id; without it a record must have one.
    """
    if not isinstance(record, dict):
        raise BrokenSample(f"record is a JSON {type(record).__name__}, not an object")
    turns = [_parse_turn(turn, number) for number, turn in enumerate(_list_of_turns(record), 1)]
    films, clips = _parse_clips(record.get("video"))
    images, videos = _parse_names(record.get("image"), "image"), _parse_names(films, "video")
    known = ("id", "image", "video", "conversations", *NUMBERS.values(), DOCUMENTS)
    extra = {name: value for name, value in record.items() if name not in known}
    for name in extra.keys() & CONTENT_FIELDS:
        if extra[name] not in (None, "", [], {}):
            raise BrokenSample(f"field {name!r} is not one of a shard's record; 'data build' reads other forms")
    numbers = [parse_numbers(record.get(name), name) for name in (*NUMBERS.values(), DOCUMENTS)]
    turns = _place_media(turns, len(images), len(videos))
    identity, (image_numbers, video_numbers, documents) = record_id(record, default_id), numbers
    conversation = Conversation(
        identity, images, tuple(turns), extra, videos, image_numbers, video_numbers, clips, documents
    )
    check_learned(conversation)
    return conversation


def check_learned(conversation: Conversation) -> None:
    """Raises BrokenSample if no answer is learned."""
    answers = [turn for turn in conversation.turns if turn.role == "assistant"]
    if not answers:
        raise BrokenSample("nothing to learn: no turn from gpt/assistant")
    if not any(turn.learned for turn in answers):
        raise BrokenSample("nothing to learn: no answer is learned ('loss' or 'weight' says so)")


def _clip_record(name: str, clip: Stretch) -> dict[str, Any]:
    return {"path": name, "start": clip[0], **({} if clip[1] is None else {"end": clip[1]})}


def _parse_clips(value: Any) -> tuple[Any, tuple[Stretch | None, ...]]:
    """The names under "video", and which part of each is shown; none if all are whole."""
    if not isinstance(value, list) or not any(isinstance(film, dict) for film in value):
        return value, ()
    names: list[Any] = []
    clips: list[Stretch | None] = []
    for film in value:
        part = film if isinstance(film, dict) else {"path": film}
        start, end = part.get("start"), part.get("end")
        if not part.keys() <= {"path", "start", "end"} or not all(
            isinstance(seconds, int | float | None) and not isinstance(seconds, bool) for seconds in (start, end)
        ):
            raise BrokenSample(f"'video' is no {{'path', 'start', 'end'}} of numbers: {str(film)[:100]}")
        names.append(part.get("path"))
        clips.append((float(start or 0), None if end is None else float(end)) if isinstance(film, dict) else None)
    return names, tuple(clips)


def parse_numbers(value: Any, name: str) -> tuple[int, ...]:
    """Whole numbers of a record, none if it has none; raises BrokenSample."""
    given = [] if value is None else value
    if not isinstance(given, list) or not all(type(number) is int for number in given):
        raise BrokenSample(f"{name!r} is no list of whole numbers")
    return tuple(given)


def record_id(record: Any, default: str | None = None) -> str:
    """The record's id as a string, or ``default``; raises BrokenSample if there is neither."""
    value = record.get("id") if isinstance(record, dict) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value:
        return valid_unicode(value, "id")
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
    learned = turn.get("loss", True)
    if not isinstance(learned, bool):
        raise BrokenSample(f"turn {number} has a {type(learned).__name__} as its 'loss', not true or false")
    return Turn(ROLES[name], valid_unicode(text.strip(), f"turn {number}"), learned)


def valid_unicode(text: str, where: str) -> str:
    """JSON can spell half a character (a lone surrogate), which is no text and cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BrokenSample(f"{where} is not valid Unicode (a lone surrogate)") from None
    return text


def _parse_names(value: Any, kind: str) -> tuple[str, ...]:
    names = [] if value is None or value == "" else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BrokenSample(f"'{kind}' is neither a path nor a list of paths: {value!r}")
    return tuple(names)


def _place_media(turns: list[Turn], images: int, videos: int) -> list[Turn]:
    """Without any marker, all images and then all videos go before the first human turn's text."""
    found = {kind: sum(count_markers(turn.text, kind) for turn in turns) for kind in MARKERS}
    if not images and videos and found == {"image": videos, "video": 0}:
        return [replace(turn, text=rename_markers(turn.text, lambda mark: VIDEO_MARKER)) for turn in turns]
    if any(found.values()):
        return turns
    markers = f"{MARKER}\n" * images + f"{VIDEO_MARKER}\n" * videos
    for number, turn in enumerate(turns):
        if turn.role == "user":
            return [*turns[:number], Turn("user", (markers + turn.text).strip()), *turns[number + 1 :]]
    return turns


@dataclass
class EncodedConversation:
    """tokens, labels: int64 [n], labels not shifted; tile_slots: int64 [t], position of each tile's first token."""

    tokens: Tensor
    labels: Tensor
    tile_slots: Tensor


@dataclass(frozen=True)
class ShownFrame:
    """A frame of a video: the words before it and its tiles."""

    words: str
    tiles: int


def encode_conversation(
    conversation: Conversation,
    tokenizer: Tokenizer,
    tiles: Sequence[int],
    tokens_per_tile: int,
    system: str = DEFAULT_SYSTEM,
    videos: Sequence[Sequence[ShownFrame]] = (),
) -> EncodedConversation:
    """Token ids and labels of a whole conversation.

    tiles: tiles of each image, thumbnail included; an image of 0 is left out, with its number.
    system: text of the system turn of a conversation that brings none; empty for no such turn.
    videos: frames of each video. A frame's words are tokenised by themselves, so that tokens of text and of frames can
        be counted apart.
    """
    writer = _Writer(conversation, tokenizer, tiles, tokens_per_tile, videos)
    writer.turns(conversation.turns, system)
    return writer.finish()


def encode_prompt(
    conversation: Conversation,
    tokenizer: Tokenizer,
    tiles: Sequence[int],
    tokens_per_tile: int,
    system: str = DEFAULT_SYSTEM,
    videos: Sequence[Sequence[ShownFrame]] = (),
) -> EncodedConversation:
    """What a model reads before it writes the next answer: the turns, without the assistant's last one if the
    conversation ends with it, and the header of an answer.

    It is exactly the beginning of what ``encode_conversation`` gives; no label is learned.
    """
    ends_with_answer = conversation.turns[-1].role == "assistant"
    writer = _Writer(conversation, tokenizer, tiles, tokens_per_tile, videos)
    writer.turns(conversation.turns[:-1] if ends_with_answer else conversation.turns, system)
    writer.header("assistant")
    prompt = writer.finish()
    return EncodedConversation(prompt.tokens, torch.full_like(prompt.labels, IGNORE_LABEL), prompt.tile_slots)


class _Writer:
    """Appends ChatML: ``<|im_start|>ROLE\nTEXT<|im_end|>\n``, with images and frames in place of their markers."""

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: Tokenizer,
        tiles: Sequence[int],
        tokens_per_tile: int,
        videos: Sequence[Sequence[ShownFrame]],
    ) -> None:
        self._tokenizer = tokenizer
        self._numbers = conversation.numbers("image")
        self._media = bool(conversation.images or conversation.videos)
        self._tiles, self._videos = tiles, videos
        self._tokens_per_tile = tokens_per_tile
        self._images = self._films = 0
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
            self._content(turn.text, learned=turn.role == "assistant" and turn.learned)

    def header(self, role: Role) -> None:
        self._append([self._tokenizer.im_start, *self._tokenizer.encode(f"{role}\n")])

    def _content(self, text: str, *, learned: bool) -> None:
        # An image always ends with one newline of its own, so the one that usually follows a marker is taken with it.
        piece, *rest = cut_at_markers(text, media=self._media)
        for marker, following in zip(rest[::2], rest[1::2], strict=True):
            if marker == MARKER and not self._tiles[self._images]:
                self._images += 1
                piece += following.removeprefix("\n")
                continue
            if marker == MARKER:
                # Images are numbered when there are several (NVlabs/Eagle's training data preparation).
                several = len(set(self._numbers)) > 1
                number = f"<image {self._numbers[self._images]}>" if several else ""
                self._append(self._tokenizer.encode(piece + number), learned)
                self._picture(self._tiles[self._images])
                self._images += 1
            else:
                self._append(self._tokenizer.encode(piece), learned)
                for frame in self._videos[self._films]:
                    self._append(self._tokenizer.encode(frame.words))
                    self._picture(frame.tiles)
                self._films += 1
            piece = "\n" + following.removeprefix("\n")
        self._append(self._tokenizer.encode(piece), learned)
        self._append([self._tokenizer.im_end], learned)
        self._append(self._tokenizer.encode("\n"))

    def _picture(self, tiles: int) -> None:
        self._append([self._tokenizer.image_start])
        start = len(self._tokens)
        self._slots += [start + tile * self._tokens_per_tile for tile in range(tiles)]
        self._append([self._tokenizer.image_context] * (tiles * self._tokens_per_tile))
        self._append([self._tokenizer.image_end])

    def finish(self) -> EncodedConversation:
        for what, shown, given in (("images", self._images, self._tiles), ("videos", self._films, self._videos)):
            if shown != len(given):
                raise ValueError(f"{shown} {what} were shown, {len(given)} were given")
        return EncodedConversation(
            *(torch.tensor(x, dtype=torch.int64) for x in (self._tokens, self._labels, self._slots))
        )
