"""docs/recipe.md and its schema say what the classes say; ``python tools/recipe_reference.py`` writes them anew."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_and_the_schema_are_current() -> None:
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / "tools" / "recipe_reference.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page()
    assert tool.SCHEMA.read_text(encoding="utf-8") == tool.schema()
