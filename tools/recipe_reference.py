"""Writes docs/recipe.md, every key of a recipe on one page, and the JSON schema beside it.

    python tools/recipe_reference.py

Both are made from the classes that check a recipe and from the table that decides what a stage that continues may
change; tests/docs/test_recipe_reference.py says when they are old.
"""

import json
from pathlib import Path

from megatron_eagle.config.explained import (
    OF_EACH_KEY,
    about,
    json_schema,
    keys_explained,
    kinds_explained,
    settings_class,
)
from megatron_eagle.config.recipe import Recipe
from megatron_eagle.training.resume_rules import MASTER_WEIGHTS, REFUSED, WITHOUT_EFFECT

DOCS = Path(__file__).parents[1] / "docs"
PAGE, SCHEMA = DOCS / "recipe.md", DOCS / "recipe.schema.json"

HEAD = """# Every key of a recipe

Written by `python tools/recipe_reference.py` from the classes that check a recipe; a test holds it to them. The same on
the command line:

```
megatron-eagle recipe --explain reading.packing
megatron-eagle recipe eagle2-9b --explain stages
```

`megatron-eagle recipe RECIPE` prints a recipe with every default and what each key does. An editor that reads JSON
schemas completes and checks keys with [recipe.schema.json](recipe.schema.json) (`megatron-eagle recipe --schema`): put
`# yaml-language-server: $schema=PATH/recipe.schema.json` on the first line.

Keys under `stages.NAME` are a stage's own. Of the others only `layout` can be replaced by a stage. A stage that was
interrupted continues with the recipe as it is given then, and says what changed; what it refuses is noted at the key.
Not noted there, because their content decides and not a key: the model, and the data's order (docs/checkpoints.md).

"""


def page() -> str:
    """The page as Markdown."""
    return (HEAD + "\n".join([*_section(Recipe, "", set()), *_encoders()]) + "\n").replace("``", "`")


def schema() -> str:
    """The schema as JSON."""
    return json.dumps(json_schema(), indent=1) + "\n"


def _section(settings: type, place: str, seen: set[type]) -> list[str]:
    seen.add(settings)
    lines = [f"## {f'`{place}`' if place else 'The recipe'}", "", about(settings), "", *_table(settings, place), ""]
    for key in keys_explained(settings):
        below = settings_class(key.hint)
        if below is not None and below not in seen:
            many = "a list" in key.wanted
            name = ".NAME" if many and below.__name__ == "Stage" else ".0" if many else ""
            lines += _section(below, f"{place}.{key.name}{name}".removeprefix("."), seen)
    return lines


def _table(settings: type, place: str) -> list[str]:
    rows = ["| key | what it does | may be | default |", "|---|---|---|---|"]
    for key in keys_explained(settings):
        full = f"{place}.{key.name}".removeprefix(".")
        note = _when_continuing(full)
        default = "needed" if key.default is None else key.default
        default = default if default in ("needed", OF_EACH_KEY) else f"`{default}`"
        cells = (f"`{key.name}`", key.meaning + note, key.wanted, default)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _when_continuing(key: str) -> str:
    name = key.replace("stages.NAME.", "stage.")
    if name in REFUSED:
        return f" *Refused when continuing with another: {REFUSED[name]}.*"
    if name in MASTER_WEIGHTS:
        return f" *Refused when continuing with another, but where both keep them: {MASTER_WEIGHTS[name]}.*"
    return f" *Another one has no effect when continuing: {WITHOUT_EFFECT[name]}.*" if name in WITHOUT_EFFECT else ""


def _encoders() -> list[str]:
    what = "An entry has the `kind` of the encoder ([encoders.md](encoders.md)) and its numbers."
    lines = ["## `model.encoders.0`", "", what, ""]
    for kind, settings in kinds_explained():
        lines += [f"### kind: {kind}", "", about(settings), "", *_table(settings, ""), ""]
    return lines[:-1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")
    print(f"wrote {PAGE} and {SCHEMA}")
