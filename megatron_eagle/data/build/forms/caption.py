"""A medium and a caption, ``caption`` or ``text``: one question that the caption answers."""

from collections.abc import Mapping
from typing import Any

from megatron_eagle.data.build.forms.draft import Said
from megatron_eagle.errors import BrokenSample

CAPTION_FIELDS = ("caption", "text")
KEYS = frozenset(CAPTION_FIELDS)


def find_caption(record: Mapping[str, Any]) -> str | None:
    """The caption of a record, None if it has none; raises BrokenSample if it has two that differ."""
    found = {name: record[name] for name in CAPTION_FIELDS if isinstance(record.get(name), str)}
    if len(set(found.values())) > 1:
        raise BrokenSample(f"two captions: {' and '.join(found)} differ")
    return next(iter(found.values()), None)


def read(caption: str, prompt: str) -> tuple[Said, ...]:
    """The turns of a caption."""
    return Said("user", (prompt,)), Said("assistant", (caption,))
