"""Media beside the turns, under the keys of several projects, and Eagle's ``data``, [{"type", "image_list"}].

(NVlabs/Eagle, ``Eagle2_5/document/2.preparing_playground.md`` and ``Embodied/document/DATA_PREPARATION.md``.)
"""

from collections.abc import Mapping
from typing import Any

from megatron_eagle.data.build.forms.draft import Medium, shorten
from megatron_eagle.data.build.forms.keys import says_nothing
from megatron_eagle.data.build.forms.media import kind_of_name, read_media
from megatron_eagle.data.build.forms.place import MARKS
from megatron_eagle.data.build.forms.turns import MEDIA_KEYS
from megatron_eagle.data.sample.markers import Kind
from megatron_eagle.errors import BrokenSample

FILE_NAME = "file_name"
KEYS = frozenset({*MEDIA_KEYS, FILE_NAME, "data"})
EAGLE_KEYS = frozenset({"data", "image_list", "video_list"})


def read(record: Mapping[str, Any]) -> tuple[Medium, ...]:
    """All media of a record, by their kinds; raises BrokenSample if two keys may speak of the same ones."""
    found: dict[str, list[Medium]] = {}
    for key in sorted(KEYS & record.keys()):
        value = record[key]
        if says_nothing(value):
            continue
        if key == "data":
            found[key] = _read_data(value)
        elif key == FILE_NAME:
            found[key] = read_media(value, kind_of_name(value) if isinstance(value, str) else "image", key)
        else:
            found[key] = read_media(value, MEDIA_KEYS[key], key)
    for kind in MARKS:
        keys = [key for key, media in found.items() if any(medium.kind == kind for medium in media)]
        if len(keys) > 1:
            raise BrokenSample(f"{kind}s under several keys: {', '.join(keys)}")
    media = [medium for part in found.values() for medium in part]
    return tuple(sorted(media, key=lambda medium: medium.kind))


def _read_data(value: Any) -> list[Medium]:
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise BrokenSample(f"'data' is no list of {{'type', 'image_list' or 'video_list'}}: {shorten(value)}")
    media: list[Medium] = []
    kinds: list[Kind] = []
    for part in value:
        kind = part.get("type")
        if kind not in ("image", "video"):
            raise BrokenSample(f"'data' has type {shorten(repr(kind))}; known are image, video")
        known = {"type", f"{kind}_list"}
        strange = [name for name, given in part.items() if name not in known and not says_nothing(given)]
        if strange:
            raise BrokenSample(f"'data' has {shorten(strange[0])!r}, which is not understood")
        if kind in kinds:
            raise BrokenSample(f"'data' lists {kind}s twice")
        kinds.append(kind)
        media += read_media(part.get(f"{kind}_list"), kind, f"{kind}_list")
    return media
