"""Every key of a recipe explained: what it does, what it may be, its default; and the same as a JSON schema.

The words stand once, in the docstring of the class that has the key (``name: what it does``), the ranges once, in the
types. ``megatron-eagle recipe --explain``, the comments of a printed recipe, docs/recipe.md and the schema for editors
are made from them, so that none of the four can say something else than what is checked.
"""

import inspect
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BeforeValidator, TypeAdapter

from megatron_eagle.config.encoders import encoder_kinds, encoder_spec
from megatron_eagle.config.model import QwenConfig
from megatron_eagle.config.numbers import Range, flag, shown
from megatron_eagle.config.packing_rules import PackingName, packing_rules
from megatron_eagle.config.recipe import Recipe
from megatron_eagle.config.schema import KeysOf, advice, core, is_optional, keys_of, meant
from megatron_eagle.errors import UserError
from megatron_eagle.text import WIDTH, folded

ENCODERS = ("model", "encoders")
OF_EACH_KEY = "that of each key below"


@dataclass(frozen=True)
class Key:
    """One key. name: of the key alone. wanted: what it may be. default: as YAML, None if there is none.

    hint: its type; meaning: what it does, one paragraph.
    """

    name: str
    wanted: str
    default: str | None
    meaning: str
    hint: Any

    @property
    def settings(self) -> type | None:
        """The class whose keys stand below this one, or below each of its entries."""
        return settings_class(self.hint)


def settings_class(hint: Any) -> type | None:
    """The class of settings that ``hint`` is, or holds a list of; None where it is neither."""
    inner = core(hint)
    if get_origin(inner) is tuple:
        return settings_class(get_args(inner)[0])
    kept = next((extra.settings for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, KeysOf)), inner)
    return kept if isinstance(kept, type) and is_dataclass(kept) else None


@lru_cache
def keys_explained(settings: type) -> tuple[Key, ...]:
    """The keys of a class of settings, in its order."""
    meanings, hints = _meanings(settings), keys_of(settings)
    return tuple(
        Key(field.name, _wanted(hints[field.name]), _default(field), meanings.get(field.name, ""), hints[field.name])
        for field in fields(settings)
    )


def about(settings: type) -> str:
    """What a class of settings is for: the first paragraph of its docstring."""
    return " ".join(inspect.cleandoc(settings.__doc__ or "").partition("\n\n")[0].split())


def kinds_explained() -> Iterator[tuple[str, type]]:
    """Each kind of encoder with the class of its keys, which stand beside ``kind`` in an entry of model.encoders."""
    for kind in encoder_kinds():
        yield kind, encoder_spec(kind).config


def explain(path: str, recipe: Mapping[str, Any] | None = None) -> str:
    """What there is to say of the key at ``path`` ("layout.tp", "stages.stage1.steps", "stages"), for a terminal.

    recipe: as plain data, whose values of the key are added. Raises UserError with what was meant if there is no such
    key.
    """
    where, key = _find(path)
    lines = [path if key.name == path.rpartition(".")[2] else f"{path}: an entry of {key.name}"]
    lines += textwrap.wrap(key.meaning, WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines.append(folded(f"  wanted:  {key.wanted}", " " * 11))
    lines.append(f"  default: {'none, it is needed' if key.default is None else key.default}")
    if recipe is not None:
        lines += [f"  {name} is {value}" for name, value in _values(recipe, where)]
    below = key.settings
    if below is not None:
        lines += ["", *textwrap.wrap(about(below), WIDTH)]
        width = max(len(one.name) for one in keys_explained(below))
        for one in keys_explained(below):
            first = f"  {one.name:<{width}}  "
            lines += textwrap.wrap(
                f"{one.meaning} ({_bounds(one)})", WIDTH, initial_indent=first, subsequent_indent=" " * len(first)
            )
    if where == ENCODERS:
        lines += ["", "each entry has its kind and the numbers of that kind, see docs/encoders.md:"]
        lines += [f"  {kind}: {', '.join(one.name for one in keys_explained(of))}" for kind, of in kinds_explained()]
    return "\n".join(lines)


def commented_yaml(recipe: Mapping[str, Any]) -> str:
    """The recipe as YAML, each key with what it does where it stands first."""
    return "".join(f"{line}\n" for line in _commented(recipe, Recipe, set(), ""))


def json_schema() -> dict[str, Any]:
    """A JSON schema of recipes, for editors; each key has its description."""
    schema = TypeAdapter(Recipe).json_schema()
    of_name = {kind.__name__: kind for kind in _classes(Recipe)}
    for name, part in [("Recipe", schema), *schema["$defs"].items()]:
        for key in keys_explained(of_name[name]):
            part["properties"][key.name] |= {"description": key.meaning}
            _add_range(part["properties"][key.name], key.hint)
        part["description"] = about(of_name[name])
        part["additionalProperties"] = False
    partial = TypeAdapter(QwenConfig).json_schema()
    schema["$defs"]["ModelSettings"]["properties"]["language"] |= {
        "properties": partial["properties"],
        "additionalProperties": False,
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Recipe of megatron-eagle", **schema}


def _classes(settings: type) -> Iterator[type]:
    """The class and those of its keys, each once or more."""
    yield settings
    for key in keys_explained(settings):
        if key.settings is not None:
            yield from _classes(key.settings)


def _meanings(settings: type) -> dict[str, str]:
    """Key -> what its class's docstring, or that of a base, says behind ``key:`` at the beginning of a line."""
    found: dict[str, str] = {}
    for kind in reversed(settings.__mro__):
        names = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
        current: list[str] = []
        for line in inspect.cleandoc(kind.__doc__ or "").splitlines():
            entry = re.match(r"([a-z_0-9]+(?:, [a-z_0-9]+)*): (.*)", line)
            if entry and set(entry[1].split(", ")) <= names:
                current = entry[1].split(", ")
                found |= dict.fromkeys(current, entry[2].strip())
            elif not line.startswith(" "):
                current = []
            else:
                found |= {name: f"{found[name]} {line.strip()}" for name in current}
    return found


def _wanted(hint: Any) -> str:
    null = " or null" if is_optional(_without_annotation(hint)) else ""
    return _wanted_without_null(hint) + null


def _without_annotation(hint: Any) -> Any:
    """The type without ``Annotated`` around it."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _wanted_without_null(hint: Any) -> str:
    check, inner = _check(hint), core(hint)
    if check is not None:
        return "true or false" if check is flag else str(check)
    origin, arguments = get_origin(inner), get_args(inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin is tuple:
        return f"a list, each: {_wanted(arguments[0])}"
    if origin is dict and settings_class(hint) is None:
        return "a mapping" if arguments[1] is Any else f"a mapping, each value: {_wanted(arguments[1])}"
    if hint is PackingName:
        return f"one of {', '.join(packing_rules())}"
    return "a text" if inner is str else "a mapping of the keys below"


def _check(hint: Any) -> Any:
    """The ``Range`` of a number, or ``flag``; None for anything else."""
    for one in _annotated(hint):
        for extra in getattr(one, "__metadata__", ()):
            if isinstance(extra, BeforeValidator) and (isinstance(extra.func, Range) or extra.func is flag):
                return extra.func
    return None


def _add_range(schema: dict[str, Any], hint: Any) -> None:
    """The bounds of a number, where the schema of a key says that it is one."""
    check = _check(hint)
    if isinstance(check, Range):
        number = next(part for part in schema.get("anyOf", [schema]) if part["type"] in ("integer", "number"))
        if math.isfinite(check.low):
            number["exclusiveMinimum" if check.above else "minimum"] = check.low
        if math.isfinite(check.high):
            number["exclusiveMaximum" if check.below else "maximum"] = check.high


def _annotated(hint: Any) -> Iterator[Any]:
    """``hint``, and what it is made of if it may also be null."""
    yield hint
    inner = _without_annotation(hint)
    if get_origin(inner) is Union or type(inner).__name__ == "UnionType":
        yield from get_args(inner)


def _default(field: Any) -> str | None:
    if field.default_factory is not MISSING:
        made = field.default_factory()
        return shown(made) if isinstance(made, dict | tuple | list) else OF_EACH_KEY
    if field.default is MISSING:
        return None
    return shown(list(field.default) if isinstance(field.default, tuple) else field.default)


def _bounds(key: Key) -> str:
    return f"{key.wanted}; {'needed' if key.default is None else key.default}"


def _find(path: str) -> tuple[tuple[str, ...], Key]:
    """(place without names of entries, key); the name of an entry may hold dots."""
    parts, where = path.split("."), list[str]()
    settings: type | None = Recipe
    key: Key | None = None
    while parts:
        name = parts.pop(0)
        found = {one.name: one for one in keys_explained(settings)} if settings is not None else {}
        if name not in found:
            hint = advice(Recipe, (*where, name)) if settings is not None else ""
            raise UserError(f"{path}: no such key{hint}")
        key = found[name]
        where.append(name)
        settings = key.settings
        if get_origin(core(key.hint)) is tuple and settings is not None:
            parts = _behind_the_name(parts, {one.name for one in keys_explained(settings)})
    assert key is not None
    return tuple(where), key


def _behind_the_name(parts: list[str], keys: set[str]) -> list[str]:
    """What of ``parts`` follows the name of an entry, which may hold dots; a key written wrongly is no name."""
    for number, part in enumerate(parts):
        if part in keys or (number and meant(part, keys)):
            return parts[number:]
    return []


def _values(node: Any, where: tuple[str, ...], name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of a key; of each entry where lists stand on the way."""
    if isinstance(node, list) and where:
        for number, entry in enumerate(node):
            yield from _values(entry, where, f"{name}.{entry.get('name', number)}")
    elif where and isinstance(node, dict):
        yield from _values(node.get(where[0]), where[1:], f"{name}.{where[0]}".removeprefix("."))
    elif isinstance(node, list) and node and isinstance(node[0], dict):
        yield name, ", ".join(str(entry.get("name", number)) for number, entry in enumerate(node))
    elif not where:
        yield name, shown(node, 200)


def _commented(node: Mapping[str, Any], settings: type | None, said: set[Any], indent: str) -> Iterator[str]:
    known = {key.name: key for key in keys_explained(settings)} if settings is not None else {}
    for name, value in node.items():
        key = known.get(name)
        if key is not None and (settings, name) not in said:
            said.add((settings, name))
            yield from textwrap.wrap(
                _comment(key), WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
            )
        below = key.settings if key is not None else None
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _commented(value, below, said, f"{indent}  ")
        elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            yield f"{indent}{name}:"
            for entry in value:
                yield from _entry(entry, below, said, indent)
        else:
            yield f"{indent}{name}: {_in_one_line(value)}"


def _comment(key: Key) -> str:
    """The first sentence, and the words that may stand there."""
    sentence = re.split(r"(?<=[a-z0-9`)])\\.(?= [A-Z`])", key.meaning)[0].rstrip(".")
    return f"{sentence} ({key.wanted})" if get_origin(core(key.hint)) is Literal else sentence


def _in_one_line(value: Any) -> str:
    text = yaml.safe_dump(value, allow_unicode=True, width=math.inf, default_flow_style=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _entry(entry: Mapping[str, Any], settings: type | None, said: set[Any], indent: str) -> Iterator[str]:
    """An entry of a list: its first key stands behind a dash, comments above it."""
    begun = False
    for line in _commented(entry, settings, said, f"{indent}  "):
        if not begun and not line.lstrip().startswith("#"):
            begun, line = True, f"{indent}- {line[len(indent) + 2 :]}"
        yield line
