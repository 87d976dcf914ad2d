"""The conversation of a group of files: media with a text beside them, a caption or a whole record.

``cat.jpg`` with ``cat.txt`` is an image and its caption; ``cat.json`` may hold a record with turns, or a caption under
one of CAPTION_FIELDS. A record that names no media shows all that are in its group.
"""

from collections.abc import Mapping
from typing import Any

from megatron_eagle.data.build.containers import parse_json
from megatron_eagle.data.build.forms.caption import CAPTION_FIELDS, find_caption
from megatron_eagle.data.build.forms.eagle import KEYS as MEDIA_FIELDS
from megatron_eagle.data.build.forms.keys import says_nothing
from megatron_eagle.data.build.forms.place import MARKS
from megatron_eagle.data.build.forms.registry import ReadRecord, Rules, has_turns, names_media, read_record
from megatron_eagle.data.build.groups import TEXT_ENDINGS, Group, ending_of
from megatron_eagle.data.build.walk import names_text
from megatron_eagle.data.media.file_slice import VIDEO_ENDINGS, FileSlice
from megatron_eagle.data.media.sniff import HEAD, sniff
from megatron_eagle.errors import BrokenSample

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")


def json_of(group: Group) -> Any:
    """What the group's ``.json`` holds; None without one. Raises BrokenSample if it is no JSON."""
    data = group.read("json")
    return None if data is None else parse_json(data, f"{group.key}.json")


def read_group(group: Group, rules: Rules, name: str | None = None, record: Any = None) -> tuple[ReadRecord, list[str]]:
    """The conversation of a group, and its media that the record does not show; raises BrokenSample.

    Media that the record does not name itself are all those of its group.
    """
    if group.refused:
        raise BrokenSample("; ".join(list(group.refused.values())[:3]))
    record = json_of(group) if record is None else record
    record = {} if record is None else record
    if not isinstance(record, dict):
        raise BrokenSample(f"{group.key}.json is a JSON {type(record).__name__}, not an object")
    media = {file: _kind(file, part) for file, part in group.files.items() if ending_of(file) not in TEXT_ENDINGS}
    names = names_media(record, rules) if has_turns(record) else _names_media(record)
    found = {kind: [file for file, own in media.items() if own == kind] for kind in MARKS}
    _refuse_unknown(group, media, named=names)
    if not names:
        record = {**record, **found}
    text = _text_of(group)
    if has_turns(record):
        if text is not None:
            raise BrokenSample(f"{_name_of(group, 'txt')} beside a record with turns: which is the text?")
    else:
        record = _captioned(record, text, group, rules)
    read = read_record(record, rules, group.key if name is None else name)
    shown = {*read.conversation.images, *read.conversation.videos}
    short = {file: file.partition(f"{group.key}.")[2] for file in media}
    named = {file for file in media if file in shown or (short[file] in shown and short[file] not in media)}
    return read, [file for file in media if file not in named]


def _names_media(record: Mapping[str, Any]) -> bool:
    return any(not says_nothing(record.get(key)) for key in MEDIA_FIELDS)


def _kind(name: str, part: FileSlice) -> str:
    """What a file is: by its content, and by its ending where the content does not tell."""
    try:
        with part.open() as file:
            content = sniff(file.read(HEAD))
    except OSError as error:
        raise BrokenSample(f"{name} cannot be read: {error.strerror}") from error
    if content.kind == "other":
        return content.name
    if content.kind is not None:
        return content.kind
    ending = ending_of(name)
    return "image" if ending in IMAGE_ENDINGS else "video" if ending in VIDEO_ENDINGS else ""


def _refuse_unknown(group: Group, media: Mapping[str, str], named: bool) -> None:
    unknown = {file: kind for file, kind in media.items() if kind not in MARKS}
    if not unknown:
        return
    if not named and len(unknown) == len(media) and not group.described:
        raise BrokenSample(f"neither an image nor a video among {names_text(group.names)}")
    file, kind = next(iter(unknown.items()))
    what = f"is {kind}, which is not decoded" if kind else "is neither an image nor a video"
    raise BrokenSample(f"{file} {what}" + (f" ({names_text(group.names)})" if len(unknown) > 1 else ""))


def _name_of(group: Group, ending: str) -> str:
    return next(name for name in group.files if ending_of(name) == ending)


def _text_of(group: Group) -> str | None:
    text = group.read("txt")
    try:
        return None if text is None else text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BrokenSample(f"{group.key}.txt is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _captioned(record: dict[str, Any], text: str | None, group: Group, rules: Rules) -> dict[str, Any]:
    """The record of a caption, with turns."""
    caption = find_caption(record)
    if not _names_media(record):
        raise BrokenSample(f"neither an image nor a video among {names_text(group.names)}")
    if text is not None and caption is not None and text.strip() != caption.strip():
        raise BrokenSample(f"two captions: {group.key}.txt and {group.key}.json differ")
    caption = caption if text is None else text
    if caption is None or not caption.strip():
        raise BrokenSample(f"no caption: neither {group.key}.txt nor {' or '.join(CAPTION_FIELDS)} in {group.key}.json")
    turns = [{"from": "human", "value": rules.prompt}, {"from": "gpt", "value": caption}]
    return {**{name: value for name, value in record.items() if name not in CAPTION_FIELDS}, "conversations": turns}
