"""Dotted overrides of a recipe from the command line: ``layout.tp=2``, ``stages.stage1.5.steps=10``.

They change the plain data that the YAML file holds, before it is checked, so an override is refused like a key in the
file. Entries of a list are named by their ``name`` or counted; values are YAML.
"""

from typing import Any

import yaml

from megatron_eagle.errors import UserError


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Change one value of ``raw``; UserError names the override and what is wrong with it."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}' is not of the form key.key=value")
    *parents, last = key.split(".") if not key.startswith("stages.") else _split_stage_key(raw, key)
    node: Any = raw
    for parent in parents:
        node = _child(node, parent, override)
    value = yaml.safe_load(text)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override '{override}': '{'.'.join(parents)}' holds a single value, not keys")


def _split_stage_key(raw: dict[str, Any], key: str) -> list[str]:
    """Split ``stages.<name>.<rest>``; names may hold dots ("stage1.5"), so the longest name that fits is taken."""
    rest = key.removeprefix("stages.")
    names = [str(stage["name"]) for stage in raw.get("stages", []) if isinstance(stage, dict) and "name" in stage]
    for name in sorted(names, key=len, reverse=True):
        if rest.startswith(name + "."):
            return ["stages", name, *rest[len(name) + 1 :].split(".")]
    return ["stages", *rest.split(".")]


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, override)]
    if isinstance(node, dict):
        if node.get(key) is None:
            node[key] = {}
        return node[key]
    raise UserError(f"override '{override}': '{key}' is below a single value")


def _index(items: list[Any], key: str, override: str) -> int:
    for number, item in enumerate(items):
        if isinstance(item, dict) and str(item.get("name")) == key:
            return number
    if key.isdigit() and int(key) < len(items):
        return int(key)
    known = ", ".join(str(item["name"]) for item in items if isinstance(item, dict) and "name" in item)
    raise UserError(f"override '{override}': no entry '{key}' among {len(items)}" + (f" ({known})" if known else ""))
