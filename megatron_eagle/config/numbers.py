"""What a number or a flag of the settings may be: types that carry their range, and say it when they refuse a value.

Pydantic by itself takes ``true`` for 1, ``"010"`` for 10 and ``.nan`` for a learning rate. Every number of a recipe, a
profile or an encoder is of a type made here (``tests/config/test_numbers.py`` looks), and the command line's are too.
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator

# What YAML 1.1 takes for a text though a number is meant: an exponent without a dot, or without a sign.
_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
_READ_ELSEWHERE = {
    re.compile(r"[-+]?0[0-9_]+"): "a leading zero, which some read as octal",
    re.compile(r"[-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?"): "which some read as a number to the base of 60",
    re.compile(r"(yes|no|on|off|y|n)", re.IGNORECASE): "a flag or a text",
    re.compile(r"[-+]?[0-9][0-9_.,]*"): "a text: leave the quotes away",
}
_LARGEST = 2**63 - 1


def shown(value: object, most: int = 60) -> str:
    """``value`` for a message, at most ``most`` characters; true, false and null as YAML has them."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        text = f"<{type(value).__name__}, too long to be shown>"
    return text if len(text) <= most else f"{text[: most - 4]} ..."


@dataclass(frozen=True)
class Range:
    """The finite numbers from ``low`` to ``high``; ``above`` and ``below``: without the bound itself.

    whole: integers of 64 bits only; 4.0 is one.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False

    def __call__(self, value: object) -> int | float:
        """``value`` as a number; ValueError with the range and the value."""
        number = float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(self.refusal(value, _why_a_text(value)))
        number = _whole(number) if self.whole else _float(number)
        if isinstance(number, float) and (self.whole or not math.isfinite(number)):
            raise ValueError(self.refusal(value))
        if self.whole and abs(number) > _LARGEST:
            raise ValueError(self.refusal(value, "which does not fit into 64 bits"))
        if (number <= self.low if self.above else number < self.low) or (
            number >= self.high if self.below else number > self.high
        ):
            raise ValueError(self.refusal(value))
        return number

    def __str__(self) -> str:
        bounds = []
        if self.low > -math.inf:
            bounds.append(f"{'above' if self.above else 'of at least'} {self.low:g}")
        if self.high < math.inf:
            bounds.append(f"{'below' if self.below else 'at most'} {self.high:g}")
        return " ".join(["a whole number" if self.whole else "a finite number", " and ".join(bounds)]).strip()

    def refusal(self, value: object, why: str = "") -> str:
        """What is said of a value that is none of these numbers."""
        return f"{self} is wanted (got {shown(value)}{', ' * bool(why)}{why})"


def _whole(number: int | float) -> int | float:
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _why_a_text(value: object) -> str:
    """What is to be said of a text where a number is wanted."""
    if isinstance(value, str):
        for form, why in _READ_ELSEWHERE.items():
            if form.fullmatch(value):
                return why
    return ""


def flag(value: object) -> bool:
    """``value`` as a flag: true or false, or yes, no, on, off, which YAML 1.1 takes for them; no number is one."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    found = words.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError(f"true or false is wanted (got {shown(value)})")
    return found


Flag = Annotated[bool, BeforeValidator(flag)]
Positive = Annotated[int, BeforeValidator(Range(1, whole=True))]
Count = Annotated[int, BeforeValidator(Range(0, whole=True))]
Finite = Annotated[float, BeforeValidator(Range())]
AboveZero = Annotated[float, BeforeValidator(Range(0, above=True))]
NotNegative = Annotated[float, BeforeValidator(Range(0))]
Fraction = Annotated[float, BeforeValidator(Range(0, 1))]
Share = Annotated[float, BeforeValidator(Range(0, 1, above=True))]
BelowOne = Annotated[float, BeforeValidator(Range(0, 1, below=True))]
