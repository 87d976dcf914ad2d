"""A medium as records write it: a path, a list of them, bytes, base64, Hugging Face's {"bytes", "path"}, Eagle's clips,
pages of a document.

Only files and bytes are read. A URL or an image in LMDB is refused by name: not to show it would be a guess.
"""

import base64
import binascii
import contextlib
import re
from dataclasses import replace
from typing import Any

from megatron_eagle.data.build.forms.draft import Medium, shorten
from megatron_eagle.data.media.file_slice import VIDEO_ENDINGS
from megatron_eagle.data.media.frames import Stretch
from megatron_eagle.data.media.pages import Ranges
from megatron_eagle.data.media.sniff import HEAD, sniff
from megatron_eagle.data.sample.markers import Kind
from megatron_eagle.errors import BrokenSample

MAX_INLINE = 20 * 1024 * 1024  # bytes of a picture inside a record; OpenAI's own limit
PATH_KEYS = (
    "path", "image", "video", "document", "image_url", "video_url", "url", "file", "file_name", "file_data", "value"
)  # fmt: skip
START_KEYS = ("start", "start_time", "begin", "video_start")
END_KEYS = ("end", "end_time", "video_end")
LONGEST = 7 * 24 * 3600  # seconds, as of a video
MOST_RANGES = 1000
_RANGE = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_LEAST_BASE64 = 64  # characters; a shorter text is a path


def read_media(value: Any, kind: Kind, key: str) -> list[Medium]:
    """The media under a key, of which there may be one or a list; raises BrokenSample."""
    if value in (None, "", [], ()):
        return []
    items = list(value) if isinstance(value, list | tuple) else [value]
    return [read_medium(item, kind, key) for item in items]


def read_medium(value: Any, kind: Kind, key: str) -> Medium:
    """One medium; raises BrokenSample if it is none, or one that cannot be read whole."""
    if isinstance(value, str) and value:
        return _from_text(value, kind, key)
    if isinstance(value, bytes) and value:
        return _inline(value, kind, key)
    if isinstance(value, dict):
        return _from_object({name: part for name, part in value.items() if part is not None}, kind, key)
    raise BrokenSample(f"'{key}' is neither a path nor a list of paths: {shorten(value)}")


def kind_of_name(name: str) -> Kind:
    """What a path is taken for where nothing but its ending says it."""
    ending = name.rpartition(".")[2].lower()
    return "video" if ending in VIDEO_ENDINGS else "document" if ending == "pdf" else "image"


def _from_object(value: dict[str, Any], kind: Kind, key: str) -> Medium:
    if "video" in value:  # Eagle writes a video among images so
        kind = "video"
    part = [name for name in {"video": (*START_KEYS, *END_KEYS), "document": ("pages",)}.get(kind, ()) if name in value]
    if part:
        whole = read_medium({name: given for name, given in value.items() if name not in part}, kind, key)
        if whole.stretch or whole.pages:
            raise BrokenSample(f"'{key}' says twice which part is shown: {', '.join(part)}")
        if whole.kind == "document":
            return replace(whole, pages=read_ranges(value["pages"], key))
        return replace(whole, stretch=_read_stretch(value, key))
    if "lmdb_file" in value:
        raise BrokenSample(
            f"'{key}' lies in LMDB ({shorten(value['lmdb_file'])}), which is not read; export it to files"
        )
    if "bytes" in value:
        _only(value, ("bytes", "path"), key)
        data = value["bytes"]
        if isinstance(data, str):
            return _inline(_decode(data, key), kind, key)
        if not isinstance(data, bytes) or not data:
            raise BrokenSample(f"'{key}' has a {type(data).__name__} as its bytes: {shorten(data)}")
        return _inline(data, kind, key)
    names = [name for name in PATH_KEYS if name in value]
    if len(names) != 1:
        raise BrokenSample(f"'{key}' is neither a path nor a list of paths: {shorten(value)}")
    _only(value, (names[0], "filename" if names[0] == "file_data" else "detail"), key)
    return read_medium(value[names[0]], kind, key)


def _read_stretch(value: dict[str, Any], key: str) -> Stretch:
    """Start and end of a clip, in seconds of its film; raises BrokenSample."""
    said: list[float | None] = []
    for names in (START_KEYS, END_KEYS):
        own = [name for name in names if name in value]
        if len(own) > 1:
            raise BrokenSample(f"'{key}' says the same twice: {', '.join(own)}")
        seconds = value[own[0]] if own else None
        if own and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST):
            raise BrokenSample(f"'{key}' has {own[0]} {shorten(seconds)}; a number of seconds from 0 is wanted")
        said.append(None if seconds is None else float(seconds))
    start, end = said[0] or 0.0, said[1]
    if end is not None and end <= start:
        raise BrokenSample(f"'{key}' is a clip from {start:g} to {end:g} seconds, which is empty")
    return start, end


def read_ranges(value: Any, key: str) -> Ranges:
    """Pages, counted from 1: ``"3-7,9"``, 3, or [3, 4]; they ascend, and none is said twice. Raises BrokenSample."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    ranges: list[tuple[int, int]] = []
    for part in parts[: MOST_RANGES + 1]:
        number = type(part) is int and 0 < part < 10**6
        match = _RANGE.fullmatch(str(part) if number else part if isinstance(part, str) else "")
        first = int(match[1]) if match else 0
        last = int(match[2] or first) if match else 0
        if not 1 <= first <= last or (ranges and first <= ranges[-1][1]):
            raise BrokenSample(
                f"'{key}' has pages {shorten(value)}; wanted are ascending numbers from 1, such as \"3-7,9\" or [3, 4]"
            )
        ranges.append((first, last))
    if not 1 <= len(ranges) <= MOST_RANGES:
        raise BrokenSample(f"'{key}' has {len(parts)} ranges of pages, from 1 to {MOST_RANGES} are read")
    return tuple(ranges)


def _only(value: dict[str, Any], known: tuple[str, ...], key: str) -> None:
    for name in value:
        if name not in known:
            raise BrokenSample(f"'{key}' has {shorten(name)!r}, which is not understood")


def _from_text(value: str, kind: Kind, key: str) -> Medium:
    if value.startswith("data:"):
        head, comma, body = value.partition(",")
        if not comma or ";base64" not in head:
            raise BrokenSample(f"'{key}' is a data: URI without base64: {shorten(value)}")
        return _inline(_decode(body, key), kind, key)
    if _URL.match(value):
        raise BrokenSample(f"{kind} {shorten(value)} is a URL; only files are read: download it first")
    if len(value) >= _LEAST_BASE64 and _is_base64(value, kind):
        return _inline(_decode(value, key), kind, key)
    return Medium(kind, value)


def _is_base64(value: str, kind: Kind) -> bool:
    """Whether a text is the bytes of a known format; raises BrokenSample if it is too long for a path, too."""
    start = "".join(value[: 2 * HEAD].split())[:HEAD]
    if not _BASE64.fullmatch(start):
        return False
    with contextlib.suppress(BrokenSample):
        if sniff(_decode(start[: len(start) - len(start) % 4], kind)).kind is not None:
            return True
    if len(value) <= HEAD:
        return False
    raise BrokenSample(f"{kind} {shorten(value)} looks like base64, but its bytes are of no known format")


def _decode(text: str, key: str) -> bytes:
    if len(text) * 3 // 4 > MAX_INLINE:
        raise BrokenSample(f"'{key}' holds {len(text) * 3 // 4} bytes as base64, the limit is {MAX_INLINE}: use a file")
    text = "".join(text.split()).replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BrokenSample(f"'{key}' is not base64 ({error}): {shorten(text)}") from None


def _inline(data: bytes, kind: Kind, key: str) -> Medium:
    found = sniff(data[:HEAD])
    if kind == "video" or found.kind == "video":
        raise BrokenSample(
            f"'{key}' holds the bytes of a video ({len(data)}); only images and documents may be inside a record"
        )
    if (kind == "document") != (found.kind == "document"):
        wanted = "a PDF" if kind == "document" else "an image (the key of a PDF is 'document')"
        raise BrokenSample(f"'{key}' holds {len(data)} bytes of {found.name or 'no known format'}, not {wanted}")
    if len(data) > MAX_INLINE:
        raise BrokenSample(f"'{key}' holds {len(data)} bytes, the limit is {MAX_INLINE}: use a file")
    return Medium(kind, data=data)
