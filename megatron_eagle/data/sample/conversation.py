"""A conversation: a ShareGPT/LLaVA record, checked, and back.

Records look like ``{"id": ..., "image": "a.png" or [...], "conversations": [{"from": "human", "value": "..."}]}``, with
"video" like "image". ``<image>`` in a text says where an image is shown, ``<video>`` where a video is, in the order of
the lists; a record without any marker shows its images and videos before the first human turn (the LLaVA and InternVL
rule), and one of videos alone may call them ``<image>`` (LLaVA-Video does); any other difference between markers and
media is an error, never a guess. This is the form that shards hold; ``data/build/forms`` reads the field's other forms
into it, ``chatml.py`` makes tokens of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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
