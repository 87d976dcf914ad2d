"""Dotted overrides of a recipe from the command line: ``layout.tp=2``, ``stages.stage1.5.steps=10``.

They change the plain data that the YAML file holds, before it is checked, so an override is refused like a key in the
file. Entries of a list are named by their ``name`` or counted.

Values are YAML, with two rules for what is written in a shell. A text (``reading.system``, ``reading.video.frame``) is
taken as it stands, spaces included, even where YAML would read a mapping, a number or a comment; quotes around it are
taken off. Only what begins with one of YAML's own signs ({ [ @ % and so on) has to be YAML, and else be put in quotes.
Nothing behind the ``=`` is the empty text for a text, and null where null may stand.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, get_origin

from megatron_eagle.config.numbers import shown
from megatron_eagle.config.schema import at, core, is_optional, keys_of, meant
from megatron_eagle.config.yaml_file import YamlError, parse_yaml
from megatron_eagle.errors import UserError

Place = tuple[str | int, ...]  # where an override stands: keys, and numbers of entries
_SIGNS = tuple("{}[]@%`&*!|>'\"#,?")  # a plain scalar of YAML begins with none of them


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str], settings: type) -> None:
    """Change values of ``raw``; UserError names the override that is wrong and what is wrong with it.

    settings: the class that ``raw`` will be checked as; it says which values are texts.

    One value of the layout of a stage that has none (``stages.stage1.layout.tp=2``) gives the stage a copy of the
    recipe's with that value. The recipe's is overridden first, wherever the two stand on the command line.
    """
    given: dict[Place, str] = {}
    for override in sorted(overrides, key=lambda override: _is_of_a_stages_layout(_keys(raw, override))):
        try:
            place = _apply(raw, _keys(raw, override), override.partition("=")[2], settings)
            lost = next((other for known, other in given.items() if known[: len(place)] == place), None)
            if lost is not None:
                raise ValueError(f"it would undo {_quoted(lost)}, which is given too")
            given[place] = override
        except ValueError as error:
            raise UserError(f"override {_quoted(override)}: {error}") from None


def _quoted(override: str) -> str:
    return f"'{override}'" if len(override) <= 100 and override.isprintable() else shown(override, 100)


def _keys(raw: dict[str, Any], override: str) -> list[str]:
    key, separator, _ = override.partition("=")
    keys = _split_stage_key(raw, key) if key.startswith("stages.") else key.split(".")
    if not separator or not all(keys):
        raise UserError(f"override {_quoted(override)} is not of the form key.key=value")
    return keys


def _is_of_a_stages_layout(keys: list[str]) -> bool:
    return keys[0] == "stages" and keys[2:3] == ["layout"]


def _apply(raw: dict[str, Any], keys: list[str], text: str, settings: type) -> Place:
    *parents, last = keys
    node: Any = raw
    place: list[str | int] = []
    for depth, parent in enumerate(parents, 1):
        place.append(_key(node, parent))
        inherited = raw.get("layout") if depth == 3 and _is_of_a_stages_layout(keys) else None
        node = _child(node, parent, inherited, at(settings, parents[:depth]))
    value = _value(text, at(settings, keys))
    if not isinstance(node, list | dict):
        raise ValueError(f"'{'.'.join(parents)}' holds a single value, not keys")
    key: Any = _key(node, last)
    node[key] = value
    return *place, key


def _key(node: Any, key: str) -> str | int:
    """What ``node`` is indexed by: an entry of a list has a name and a number."""
    return _index(node, key) if isinstance(node, list) else key


def _value(text: str, hint: Any) -> Any:
    """What the text behind ``=`` means where a ``hint`` stands; None stands for a key that does not exist."""
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise ValueError("not UTF-8")
    if core(hint) is str and not (is_optional(hint) and text in ("", "null", "~")):
        return _text(text)
    if not text.strip() and hint is not None and not is_optional(hint):
        raise ValueError(f"{_type(hint)} is wanted, there is nothing behind the '='")
    return parse_yaml(text)


def _text(text: str) -> str:
    if not text.lstrip().startswith(_SIGNS):
        return text
    try:
        value = parse_yaml(text)
    except YamlError as error:
        raise ValueError(f"{error}; quotes inside the argument make it a text") from None
    return value if isinstance(value, str) and text.strip()[0] in "'\"" else text


def _type(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping", tuple: "a list"}
    kind = core(hint)
    return "a mapping" if keys_of(hint) else names.get(get_origin(kind) or kind, "a value")


def _split_stage_key(raw: dict[str, Any], key: str) -> list[str]:
    """Split ``stages.<name>.<rest>``; names may hold dots ("stage1.5"), so the longest name that fits is taken."""
    rest, stages = key.removeprefix("stages."), raw.get("stages")
    entries = stages if isinstance(stages, list) else []
    names = [str(stage["name"]) for stage in entries if isinstance(stage, dict) and "name" in stage]
    for name in sorted(names, key=len, reverse=True):
        if f"{rest}.".startswith(f"{name}."):
            return ["stages", name, *rest.split(".")[name.count(".") + 1 :]]
    return ["stages", *rest.split(".")]


def _child(node: Any, key: str, inherited: Any, hint: Any) -> Any:
    """What ``node`` holds under ``key``; where that is nothing, a copy of ``inherited`` is put there first."""
    if isinstance(node, list):
        return node[_index(node, key)]
    if not isinstance(node, dict):
        raise ValueError(f"'{key}' is below a single value")
    if node.get(key) is None:
        if get_origin(core(hint)) is tuple:
            raise ValueError(f"there are no {key} to change")
        node[key] = deepcopy(inherited) or {}
    return node[key]


def _index(items: list[Any], key: str) -> int:
    for number, item in enumerate(items):
        if isinstance(item, dict) and str(item.get("name")) == key:
            return number
    if key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(items):
        return int(key)
    names = [str(item["name"]) for item in items if isinstance(item, dict) and "name" in item]
    known = f" ({', '.join(names)[:100]}){meant(key, names)}" if names else ""
    raise ValueError(f"no entry {shown(key)} among {len(items)}{known}")
