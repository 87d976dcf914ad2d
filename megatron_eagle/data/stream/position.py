"""A saved position of a stream: which settings make it the position of that stream, and of no other."""

import json
from collections.abc import Collection
from typing import Any, Literal

from megatron_eagle.config.data import DataSettings
from megatron_eagle.data.sample.chatml import TEXT_FORMAT
from megatron_eagle.errors import UserError

# What a change of these would make another stream of; all others may change between a save and a restore.
OF_BOTH = (
    *("pack_length", "tile_size", "tokens_per_tile", "min_tiles", "max_tiles", "tiling_rule", "max_tiles_per_pack"),
    *("system", "packing", "packing_delta", "degrade", "video"),
)
OF_ONE = {
    "planned": ("plan_window",),
    "buffer": ("order", "packing_buffer", "shuffle_buffer", "max_samples_per_sequence", "max_pixels"),
}


def deciding(settings: DataSettings, order: Literal["planned", "buffer"]) -> dict[str, Any]:
    """What decides a stream of that ``reading.order``, as a saved position keeps it: settings, how text is read."""
    chosen = {name: value for name, value in settings.flat().items() if name in OF_BOTH or name in OF_ONE[order]}
    return {**chosen, "text_format": TEXT_FORMAT}


def read_position(state: bytes, identity: dict[str, Any], added: Collection[str] = ()) -> dict[str, Any]:
    """What a saved position holds; UserError unless it is of the stream that ``identity`` describes, and JSON.

    added: keys of ``identity`` that older positions lack; there they are not compared.
    Streams with ``reading.order: buffer`` once saved pickles. Unpickling runs what the file asks for, so they are not
    read any more.
    """
    if state.startswith((b"PK", b"\x80")):  # torch.save's archive, a bare pickle
        raise UserError(
            "the saved data position is a pickle, as reading.order: buffer wrote before 2026-11-25; reading it could "
            "run code, so it is refused: finish the stage with the version that saved it, or remove the stage's "
            "checkpoints and train it again"
        )
    try:
        saved: dict[str, Any] = json.loads(state)
        before = dict(saved["identity"])
        if "settings" in before and "text_format" not in before["settings"]:
            raise UserError(
                "the saved data position is of before 2026-11-26, when other line breaks stood around images and "
                "frames; finish the stage with the version that saved it, or begin the next one from its weights "
                "(docs/compatibility.md)"
            )
        if "order_format" in identity and "order_format" not in before:
            raise UserError(
                "the saved data position is of before sources were shuffled place by place (2026-11-26), so other "
                "packs would follow it; finish the stage with the version that saved it, or begin the next one from "
                "its weights (docs/compatibility.md)"
            )
        own = {name: value for name, value in identity.items() if name in before or name not in added}
        changed = differences(before, json.loads(json.dumps(own)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"the saved data position cannot be read: {type(error).__name__}: {error}") from None
    if changed:
        raise UserError(f"the saved data position is of another stream: {'; '.join(changed)}")
    return saved


def differences(saved: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """What differs between two descriptions of a stream, in words."""
    found = []
    for name in sorted(saved.keys() | own.keys()):
        before, now = saved.get(name), own.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now)
        elif before != now:
            found.append(f"{name} was {before!r}, is {now!r}")
    return found
