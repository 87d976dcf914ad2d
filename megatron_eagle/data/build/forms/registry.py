"""All forms of a record, and how one is read: its turns by the form they are in, its media, and every other key.

A new form is a file with NAME (the key that tells it), KEYS (those it reads) and ``read``, and a line in FORMS.
"""

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_eagle.data.build.forms import caption, eagle, messages, sharegpt
from megatron_eagle.data.build.forms.draft import Draft, Medium, Said, shorten
from megatron_eagle.data.build.forms.keys import HARMLESS, Ignored, check_kept, says_nothing
from megatron_eagle.data.build.forms.pairs import Alpaca, Exchanges, QueryResponse
from megatron_eagle.data.build.forms.place import Placed, place
from megatron_eagle.data.media.pages import Ranges
from megatron_eagle.data.sample.conversation import (
    CONTENT_FIELDS,
    DOCUMENTS,
    NUMBERS,
    Conversation,
    check_learned,
    parse_numbers,
    record_id,
)
from megatron_eagle.errors import BrokenSample

DEFAULT_PROMPT = "Describe this in detail."


class Form(Protocol):
    """How a list of turns is told and read."""

    NAME: str
    KEYS: frozenset[str]

    def read(self, record: Mapping[str, Any], ignored: Ignored) -> tuple[Said, ...]:
        """The turns of a record."""
        ...


FORMS: tuple[Form, ...] = (sharegpt, messages, Alpaca(), QueryResponse(), Exchanges())
SYSTEM_KEYS = frozenset({"system", "system_prompt"})
# Known, and refused by name: what they say would have to be shown.
REFUSED = {
    "tools": "tools would have to be written into the system turn, which is not done",
    "functions": "functions would have to be written into the system turn, which is not done",
    "audio": "sound is not read", "audios": "sound is not read",
    "chosen": "preferences are not learned", "rejected": "preferences are not learned",
    "rejected_response": "preferences are not learned",
}  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """How records are read. prompt: the question that a mere caption answers. ignored: keys to be left out."""

    prompt: str = DEFAULT_PROMPT
    ignored: Ignored = field(default_factory=Ignored)


@dataclass(frozen=True)
class ReadRecord:
    """A conversation, and the bytes of media that its record held itself, by the names they have in it.

    documents: which of its images, by number, are documents, and which of their pages are shown.
    """

    conversation: Conversation
    inline: dict[str, bytes] = field(default_factory=dict)
    documents: dict[int, Ranges] = field(default_factory=dict)


def read_record(record: Any, rules: Rules, default_id: str | None = None) -> ReadRecord:
    """Reads a record in any form; raises BrokenSample with the reason, which names what is not understood."""
    if not isinstance(record, dict):
        raise BrokenSample(f"record is a JSON {type(record).__name__}, not an object")
    identity = record_id(record, default_id)
    given = rules.ignored.without(record)
    placed = place(_draft(given, rules))
    inline: dict[str, bytes] = {}
    names = {kind: tuple(_name(medium, inline) for medium in media) for kind, media in placed.media.items()}
    known = _known(given)
    dropped = known | CONTENT_FIELDS | REFUSED.keys()
    extra = {
        name: _storable(value) for name, value in record.items() if name not in dropped and not _holds_bytes(value)
    }
    clips = tuple(medium.stretch for medium in placed.media["video"])
    documents = {
        number: medium.pages
        for number, medium in zip(placed.numbers["image"], placed.media["image"], strict=True)
        if medium.kind == "document"
    }
    if documents and not says_nothing(given.get(DOCUMENTS)):
        raise BrokenSample(f"'{DOCUMENTS}' belongs to records of shards, whose documents are images")
    conversation = Conversation(
        identity,
        names["image"],
        placed.turns,
        extra,
        names["video"],
        _stored_numbers(given.get(NUMBERS["image"]), placed, "image"),
        _stored_numbers(given.get(NUMBERS["video"]), placed, "video"),
        video_clips=clips if any(clips) else (),
        image_documents=parse_numbers(given.get(DOCUMENTS), DOCUMENTS),
    )
    _check_answers(conversation)
    return ReadRecord(conversation, inline, documents)


def names_media(record: Mapping[str, Any], rules: Rules) -> bool:
    """Whether a record says itself which media it shows."""
    given = rules.ignored.without(record)
    if any(not says_nothing(given.get(key)) for key in eagle.KEYS):
        return True
    try:
        said = _said(given, rules)
    except BrokenSample:
        return True  # it will be rejected for that
    return any(one.own or not all(isinstance(piece, str) for piece in one.pieces) for one in said)


def has_turns(record: Mapping[str, Any]) -> bool:
    """Whether a record has turns in any form, not a mere caption."""
    return bool(_forms_of(record))


def _forms_of(given: Mapping[str, Any]) -> list[Form]:
    return [form for form in FORMS if given.get(form.NAME) is not None]


def _storable(value: Any) -> Any:
    """A value as JSON has it: Parquet has dates and decimals, which become text."""
    try:
        json.dumps(value)
    except TypeError:
        return json.loads(json.dumps(value, default=str))
    except ValueError:  # NaN or a circle; the source says so
        pass
    return value


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_bytes(part) for part in value.values())
    return isinstance(value, bytes) or (isinstance(value, list) and any(_holds_bytes(part) for part in value))


def _known(given: Mapping[str, Any]) -> frozenset[str]:
    forms = _forms_of(given)
    turns = forms[0].KEYS if forms else caption.KEYS
    return frozenset({"id", *turns, *eagle.KEYS, *SYSTEM_KEYS, *NUMBERS.values(), DOCUMENTS})


def _draft(given: Mapping[str, Any], rules: Rules) -> Draft:
    said = _said(given, rules)
    for key, why in REFUSED.items():
        if not says_nothing(given.get(key)) and not rules.ignored.all:
            raise BrokenSample(f"record: key {key!r}: {why}; --ignore-keys leaves it out")
    rules.ignored.check_keys(given, {*_known(given), *HARMLESS}, "record")
    media = eagle.read(given)
    shown = {m.path for m in media} | {m.path for s in said for m in (*s.own, *s.pieces) if isinstance(m, Medium)}
    for key in sorted(HARMLESS & given.keys() - {"id"}) if not rules.ignored.all else ():
        check_kept(given[key], key, "record", shown)
    return Draft(_with_system(said, given), media, fills=bool(eagle.EAGLE_KEYS & given.keys()))


def _said(given: Mapping[str, Any], rules: Rules) -> tuple[Said, ...]:
    forms = _forms_of(given)
    if len(forms) > 1:
        raise BrokenSample(f"turns under several keys: {', '.join(form.NAME for form in forms)}")
    if forms:
        return forms[0].read(given, rules.ignored)
    text = caption.find_caption(given)
    if text is None:
        keys = ", ".join(shorten(key, 30) for key in list(given)[:8])
        raise BrokenSample(
            f"empty conversation: no field 'conversations', nor {', '.join(form.NAME for form in FORMS[1:])}; "
            f"there are {keys or 'no fields'}"
        )
    if all(says_nothing(given.get(key)) for key in eagle.KEYS):
        raise BrokenSample("empty conversation: a caption without an image, a video or a document")
    return caption.read(text, rules.prompt)


def _with_system(said: tuple[Said, ...], given: Mapping[str, Any]) -> tuple[Said, ...]:
    """The turns after the system text that stands beside them."""
    texts = {key: given[key] for key in SYSTEM_KEYS if not says_nothing(given.get(key))}
    if not texts:
        return said
    key, text = next(iter(texts.items()))
    if len(texts) > 1 or not isinstance(text, str):
        raise BrokenSample(f"{' and '.join(sorted(texts))}: one system text is wanted")
    if said and said[0].role == "system":
        if said[0].pieces != (text,):
            raise BrokenSample(f"key {key!r} and the first turn are both from system, and differ")
        return said
    return (Said("system", (text,)), *said)


def _name(medium: Medium, inline: dict[str, bytes]) -> str:
    """What a conversation calls a medium; bytes get a name that no path can have."""
    if medium.data is None:
        return medium.path
    name = next((name for name, data in inline.items() if data is medium.data), f"data:{len(inline) + 1}")
    inline[name] = medium.data
    return name


def _stored_numbers(given: Any, placed: Placed, kind: Any) -> tuple[int, ...]:
    """Numbers other than 1, 2, 3, ...: those of the markers, or those that a record of a shard brings."""
    count = len(placed.numbers[kind])
    plain = tuple(range(1, count + 1))
    if given is not None:
        if not isinstance(given, list) or not all(type(number) is int for number in given):
            raise BrokenSample(f"'{NUMBERS[kind]}' is no list of whole numbers")
        if placed.numbers[kind] != plain:
            raise BrokenSample(f"'{NUMBERS[kind]}' and numbered markers cannot both be there")
        return tuple(given)
    return () if placed.numbers[kind] == plain else placed.numbers[kind]


def _check_answers(conversation: Conversation) -> None:
    check_learned(conversation)
    for number, turn in enumerate(conversation.turns, 1):
        if turn.role == "assistant" and turn.learned and _is_blank(turn.text):
            raise BrokenSample(f"nothing to learn: turn {number}, from gpt/assistant, is empty")


def _is_blank(text: str) -> bool:
    """Whether a text has no visible character: nothing but spaces, controls and marks of format."""
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)
