"""What keys a class of settings has, at any depth, and which of them a wrong one was meant to be.

It follows the types of dataclasses: lists are tuples of one type, whose entries are named or counted.
"""

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

MOST_LISTED = 12  # keys of a place, in a message of one line


@dataclass(frozen=True)
class KeysOf:
    """Says of a ``dict[str, Any]`` that its keys are those of a class."""

    settings: type


def keys_of(hint: Any) -> dict[str, Any]:
    """Key -> type of what ``hint`` holds; empty where it is no class of settings."""
    kept = next((extra.settings for extra in _extras(hint) if isinstance(extra, KeysOf)), core(hint))
    return _keys_of_class(kept) if isinstance(kept, type) and is_dataclass(kept) else {}


def core(hint: Any) -> Any:
    """The type without ``Annotated`` and without ``None``."""
    while True:
        if get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
        elif get_origin(hint) in (Union, types.UnionType):
            rest = [part for part in get_args(hint) if part is not type(None)]
            if len(rest) != 1:
                return hint
            hint = rest[0]
        else:
            return hint


def is_optional(hint: Any) -> bool:
    """Whether None, YAML's null, may stand there."""
    return type(None) in get_args(hint) or hint is Any


def below(hint: Any, key: str | int) -> Any:
    """The type of what stands under ``key``; None where there is no such key, Any where nothing is said of it."""
    keys = keys_of(hint)
    if keys:
        return keys.get(str(key))
    inner, arguments = core(hint), get_args(core(hint))
    if inner is Any:
        return Any
    if get_origin(inner) is tuple:
        return arguments[0]
    return arguments[1] if get_origin(inner) is dict else None


def at(settings: Any, where: Iterable[str | int]) -> Any:
    """The type at a place of the settings; None where there is none."""
    for key in where:
        settings = below(settings, key)
    return settings


@lru_cache
def places(settings: type) -> dict[str, tuple[str, ...]]:
    """Key -> where it may stand: {"steps": ("stages.NAME.steps",), ...}."""
    found: dict[str, tuple[str, ...]] = {}
    for path in _paths(settings):
        key = path.rpartition(".")[2]
        found[key] = (*found.get(key, ()), path)
    return found


def meant(given: object, names: Iterable[str]) -> str:
    """``; did you mean ...?``, or nothing if no name is near."""
    near = get_close_matches(str(given)[:60].lower(), list(names), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def advice(settings: type, where: tuple[str | int, ...]) -> str:
    """What an unknown key at ``where`` was meant to be: a key of the same place, or one that stands elsewhere.

    Where no name is near, as with ``layout.tq``, the keys of the place, if they are few.
    """
    key = str(where[-1])
    everywhere = places(settings)
    if key not in everywhere:
        if near := meant(key, keys_of(at(settings, where[:-1]))):
            return near
        key = next(iter(get_close_matches(key[:60], everywhere, n=1, cutoff=0.8)), key)
    found = everywhere.get(key, ())[:2]
    if found:
        return f"; there is {' or '.join(found)}"
    here = list(keys_of(at(settings, where[:-1])))
    return f"; there are {', '.join(here)}" if 0 < len(here) <= MOST_LISTED else ""


def _paths(hint: Any, prefix: str = "") -> Iterator[str]:
    for key, inner in keys_of(hint).items():
        yield prefix + key
        rest = core(inner)
        entry = get_args(rest)[0] if get_origin(rest) is tuple else None
        name = "NAME." if entry is not None and "name" in keys_of(entry) else "0." if entry is not None else ""
        yield from _paths(inner if entry is None else entry, f"{prefix}{key}.{name}")


def _extras(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


@lru_cache
def _keys_of_class(settings: type) -> dict[str, Any]:
    hints = get_type_hints(settings, include_extras=True)
    return {field.name: hints[field.name] for field in fields(settings)}
