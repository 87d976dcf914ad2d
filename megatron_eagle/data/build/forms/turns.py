"""One turn of a list of turns: ``from`` and ``value``, or ``role`` and ``content``, the content as text or as parts.

Parts are those of OpenAI and Hugging Face: ``{"type": "text", "text": "?"}``, ``{"type": "image", "image": "a.png"}``.
A part of an image without a path stands for the next one of the record's list.
"""

from collections.abc import Mapping
from typing import Any

from megatron_eagle.data.build.forms.draft import Medium, Piece, Said, Slot, shorten
from megatron_eagle.data.build.forms.keys import HARMLESS_IN_TURN, Ignored, check_kept
from megatron_eagle.data.build.forms.media import read_media, read_medium
from megatron_eagle.data.sample.conversation import ROLES, Role
from megatron_eagle.data.sample.markers import Kind
from megatron_eagle.errors import BrokenSample

MEDIA_KEYS: dict[str, Kind] = {
    "image": "image", "images": "image", "image_list": "image",
    "video": "video", "videos": "video", "video_list": "video",
    "document": "document", "documents": "document",
}  # fmt: skip
LOSS_KEYS = ("loss", "weight", "loss_weight")
PARTS: dict[str, Kind | None] = {
    "text": None, "input_text": None, "output_text": None,
    "image": "image", "image_url": "image", "input_image": "image",
    "video": "video", "video_url": "video",
    "document": "document", "file": "document", "input_file": "document",
}  # fmt: skip
TEXT_KEYS = ("text", "value", "content")


def read_turns(turns: Any, key: str, ignored: Ignored) -> tuple[Said, ...]:
    """A list of turns; raises BrokenSample with the number of the turn."""
    if not isinstance(turns, list):
        raise BrokenSample(f"'{key}' is a {type(turns).__name__}, not a list")
    return tuple(_read_turn(turn, number, ignored) for number, turn in enumerate(turns, 1))


def _read_turn(turn: Any, number: int, ignored: Ignored) -> Said:
    where = f"turn {number}"
    if not isinstance(turn, dict):
        raise BrokenSample(f"{where} has no 'from' and 'value'")
    role_key, text_key = _keys_of(turn, where)
    turn = ignored.without(turn, keep=(role_key, text_key))
    own = [name for name in MEDIA_KEYS if turn.get(name) is not None]
    ignored.check_keys(turn, {role_key, text_key, *LOSS_KEYS, *MEDIA_KEYS, *HARMLESS_IN_TURN}, where)
    for name in HARMLESS_IN_TURN:
        check_kept(turn.get(name), name, where)
    media = [medium for name in own for medium in read_media(turn[name], MEDIA_KEYS[name], name)]
    by_kind = [MEDIA_KEYS[name] for name in own if turn[name] not in ("", [], ())]
    if len(by_kind) != len(set(by_kind)):
        raise BrokenSample(f"{where} lists its media under several keys: {', '.join(own)}")
    role = read_role(turn[role_key], where)
    return Said(role, _read_content(turn[text_key], where, ignored), read_learned(turn, role, where), tuple(media))


def _keys_of(turn: Mapping[str, Any], where: str) -> tuple[str, str]:
    roles = [name for name in ("from", "role") if turn.get(name) is not None]
    texts = [name for name in ("value", "content") if turn.get(name) is not None]
    if len(roles) > 1 or len(texts) > 1:
        raise BrokenSample(f"{where} says the same twice: {', '.join(roles + texts)}")
    if not texts:
        texts = [name for name in ("value", "content") if name in turn]
    if not roles or not texts:
        raise BrokenSample(f"{where} has no 'from' and 'value' (or 'role' and 'content')")
    return roles[0], texts[0]


def read_role(name: Any, where: str) -> Role:
    """The role of a turn by the name that its form gives it."""
    if not isinstance(name, str) or name not in ROLES:
        raise BrokenSample(f"{where} is from {shorten(repr(name))}; known are {', '.join(ROLES)}")
    return ROLES[name]


def read_learned(turn: Mapping[str, Any], role: Role, where: str) -> bool:
    """Whether a turn is learned as its ``loss`` or ``weight`` says; only yes and no are possible."""
    said = {}
    for name in LOSS_KEYS:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BrokenSample(f"{where} has {name} {shorten(value)}; an answer is learned (1) or not (0)")
        said[name] = bool(value)
    if len(set(said.values())) > 1:
        raise BrokenSample(f"{where} contradicts itself: {', '.join(f'{n} {int(v)}' for n, v in said.items())}")
    if role != "assistant" and True in said.values():
        raise BrokenSample(f"{where}, from {role}, asks to be learned; only answers are")
    return role != "assistant" or True in said.values() or not said


def _read_content(content: Any, where: str, ignored: Ignored) -> tuple[Piece, ...]:
    if isinstance(content, str):
        return (content,)
    if isinstance(content, list):
        return tuple(_read_part(part, f"{where} part {number}", ignored) for number, part in enumerate(content, 1))
    raise BrokenSample(f"{where} has a {type(content).__name__} as its value, not text")


def _read_part(part: Any, where: str, ignored: Ignored) -> Piece:
    if not isinstance(part, dict):
        raise BrokenSample(f"{where} is a {type(part).__name__}, not an object")
    given = ignored.without(part, keep=("type",))
    name = given.pop("type", None)
    if name is None:  # as Qwen-VL writes them: {"image": ...}, {"text": ...}
        kinds = [key for key in PARTS if key in given]
        name = kinds[0] if len(kinds) == 1 else None
    if not isinstance(name, str) or name not in PARTS:
        raise BrokenSample(f"{where} is of type {shorten(repr(name))}; known are {', '.join(PARTS)}")
    kind = PARTS[name]
    return _read_text(given, where, ignored) if kind is None else _read_medium_part(given, kind, where)


def _read_text(given: dict[str, Any], where: str, ignored: Ignored) -> str:
    texts = [name for name in TEXT_KEYS if name in given]
    ignored.check_keys(given, set(texts), where)
    if len(texts) != 1 or not isinstance(given[texts[0]], str):
        raise BrokenSample(f"{where} has no text")
    return str(given[texts[0]])


def _read_medium_part(given: dict[str, Any], kind: Kind, where: str) -> Medium | Slot:
    index = given.pop("index", None)
    if not given:
        if index is None:
            return Slot(kind)
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise BrokenSample(f"{where} has index {shorten(index)}, not a number from 0")
        return Slot(kind, index + 1)
    try:
        # {"type": "image", "image": {...}} holds the medium in one key; everything else is the medium itself.
        inner = given.get(kind, given.get(f"{kind}_url", given.get("file")))
        return read_medium(inner if isinstance(inner, dict) and len(given) == 1 else given, kind, kind)
    except BrokenSample as error:
        raise BrokenSample(f"{where}: {error}") from None
