"""Numbers and flags of settings: every one has a range, and what is none of its numbers is refused with the value."""

import dataclasses
import math
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from megatron_eagle.cluster.profile import Profile
from megatron_eagle.config.data import DataSettings
from megatron_eagle.config.encoders import encoder_kinds, encoder_spec
from megatron_eagle.config.model import EagleConfig
from megatron_eagle.config.numbers import AboveZero, Count, Flag, Fraction, Positive, Range, flag, shown
from megatron_eagle.config.recipe import Recipe
from megatron_eagle.config.schema import keys_of
from megatron_eagle.planning.hardware import Hardware

CLASSES = [
    Recipe,
    DataSettings,
    EagleConfig,
    Hardware,
    Profile,
    *(encoder_spec(kind).config for kind in encoder_kinds()),
]


def bare(hint: Any, where: str, checked: bool = False) -> list[str]:
    """Places of numbers and flags that no type of ``config.numbers`` checks."""
    if get_origin(hint) is Annotated:
        inner, *extras = get_args(hint)
        checks = [extra.func for extra in extras if isinstance(extra, BeforeValidator)]
        return bare(inner, where, any(isinstance(check, Range) or check is flag for check in checks))
    if hint in (int, float, bool):
        return [] if checked else [where]
    if dataclasses.is_dataclass(hint):
        return [found for key, inner in keys_of(hint).items() for found in bare(inner, f"{where}.{key}")]
    return [found for inner in get_args(hint) if inner is not ... for found in bare(inner, where)]


@pytest.mark.parametrize("settings", CLASSES, ids=lambda settings: f"{settings.__module__}.{settings.__name__}")
def test_every_number_of_the_settings_has_a_range(settings: type) -> None:
    assert bare(settings, settings.__name__) == []


def test_a_bare_number_would_be_found() -> None:
    @dataclasses.dataclass
    class Inner:
        steps: tuple[int, ...]

    @dataclasses.dataclass
    class Bad:
        ratio: float | None
        good: Positive
        inner: Inner

    Bad.__annotations__["inner"] = Inner
    assert bare(Bad, "Bad") == ["Bad.ratio", "Bad.inner.steps"]


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (Positive, True, "a whole number of at least 1 is wanted (got true)"),
        (Positive, 0, "a whole number of at least 1 is wanted (got 0)"),
        (Positive, 4.5, "(got 4.5)"),
        (Positive, math.nan, "(got nan)"),
        (Positive, math.inf, "(got inf)"),
        (Positive, None, "(got null)"),
        (Positive, [3], "(got [3])"),
        (Positive, "4", "(got '4', a text: leave the quotes away)"),
        (Positive, "010", "(got '010', a leading zero, which some read as octal)"),
        (Positive, "1:30", "(got '1:30', which some read as a number to the base of 60)"),
        (Positive, "on", "(got 'on', a flag or a text)"),
        (Positive, 2**63, "which does not fit into 64 bits"),
        (Positive, "1e99", "which does not fit into 64 bits"),
        (Count, -1, "of at least 0"),
        (AboveZero, 0, "a finite number above 0 is wanted (got 0)"),
        (AboveZero, math.nan, "(got nan)"),
        (AboveZero, math.inf, "(got inf)"),
        (AboveZero, 10**400, "(got 1"),
        (AboveZero, "1e400", "(got '1e400')"),
        (AboveZero, False, "(got false)"),
        (AboveZero, "x" * 500, "..."),
        (Fraction, 1.0001, "a finite number of at least 0 and at most 1 is wanted (got 1.0001)"),
        (Flag, 1, "true or false is wanted (got 1)"),
        (Flag, 0.0, "true or false is wanted (got 0.0)"),
        (Flag, "maybe", "true or false is wanted (got 'maybe')"),
        (Flag, None, "(got null)"),
    ],
)
def test_what_is_no_such_number_is_refused_with_the_range(kind: Any, value: object, words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(kind).validate_python(value)
    message = refused.value.errors()[0]["msg"]
    assert words in message and len(message) < 200


@pytest.mark.parametrize(
    ("kind", "value", "number"),
    [
        (Positive, 4.0, 4),
        (Positive, "1e3", 1000),
        (Positive, 2**63 - 1, 2**63 - 1),
        (AboveZero, "1e-4", 1e-4),
        (AboveZero, "2.5E3", 2500.0),
        (AboveZero, 3, 3.0),
        (Fraction, 0, 0.0),
        (Flag, "off", False),
        (Flag, "Yes", True),
    ],
)
def test_what_is_one_is_taken(kind: Any, value: object, number: float) -> None:
    found = TypeAdapter(kind).validate_python(value)
    assert found == number and type(found) is type(number)


def test_any_value_can_be_shown() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "<list, too long to be shown>" and shown(10**5000) == "<int, too long to be shown>"
    assert shown("x" * 100) == f"'{'x' * 55} ..." and shown(True) == "true"
