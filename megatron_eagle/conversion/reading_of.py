"""The settings by which a checkpoint's samples were read, from the recipe that it carries."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megatron_eagle.checkpoint.files import read_description
from megatron_eagle.config.reading import ReadingSettings
from megatron_eagle.errors import UserError

PREFIX = "reading."
# What keys that have come since then, and names, meant in recipes of checkpoints that are older.
BEFORE = {"video.between": "\n"}
RENAMED = {"tiling_rule": {"eagle2": "ratio"}}


def reading_of(checkpoint: Path) -> ReadingSettings | None:
    """None of a checkpoint without a recipe: one that was converted, or is older than 2026-11-26.

    UserError if its settings are not those of this version.
    """
    recipe = read_description(checkpoint).recipe
    if not recipe:
        return None
    said = {key.removeprefix(PREFIX): value for key, value in recipe.items() if key.startswith(PREFIX)}
    nested: dict[str, Any] = {}
    for key, value in {**BEFORE, **said}.items():
        *folders, name = key.split(".")
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = RENAMED.get(key, {}).get(value, value) if isinstance(value, str) else value
    try:
        return TypeAdapter(ReadingSettings).validate_python(nested)
    except ValueError as error:
        raise UserError(
            f"{checkpoint} was trained with settings of reading that this version does not have: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
