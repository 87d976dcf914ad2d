"""Dotted overrides of a recipe from the command line: ``layout.tp=2``, ``stages.stage1.5.steps=10``.

They change the plain data that the YAML file holds, before it is checked, so an override is refused like a key in the
file. Entries of a list are named by their ``name`` or counted; values are YAML.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import yaml

from megatron_eagle.errors import UserError


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Change values of ``raw``; UserError names the override that is wrong and what is wrong with it.

    One value of the layout of a stage that has none (``stages.stage1.layout.tp=2``) gives the stage a copy of the
    recipe's with that value. The recipe's is overridden first, wherever the two stand on the command line.
    """
    for override in sorted(overrides, key=lambda override: _is_of_a_stages_layout(_keys(raw, override))):
        _apply(raw, _keys(raw, override), override)


def _keys(raw: dict[str, Any], override: str) -> list[str]:
    key, separator, _ = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}' is not of the form key.key=value")
    return _split_stage_key(raw, key) if key.startswith("stages.") else key.split(".")


def _is_of_a_stages_layout(keys: list[str]) -> bool:
    return keys[0] == "stages" and keys[2:3] == ["layout"]


def _apply(raw: dict[str, Any], keys: list[str], override: str) -> None:
    *parents, last = keys
    node: Any = raw
    for depth, parent in enumerate(parents, 1):
        inherited = raw.get("layout") if depth == 3 and _is_of_a_stages_layout(keys) else None
        node = _child(node, parent, override, inherited)
    try:
        value = yaml.safe_load(override.partition("=")[2])
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': the value is not valid YAML: {' '.join(str(error).split())}") from None
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


def _child(node: Any, key: str, override: str, inherited: Any = None) -> Any:
    """What ``node`` holds under ``key``; where that is nothing, a copy of ``inherited`` is put there first."""
    if isinstance(node, list):
        return node[_index(node, key, override)]
    if isinstance(node, dict):
        if node.get(key) is None:
            node[key] = deepcopy(inherited) or {}
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
