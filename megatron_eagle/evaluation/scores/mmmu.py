"""MMMU: the option or the open answer that a response ends with.

Rule: MMMU-Benchmark/MMMU, ``mmmu/utils/eval_utils.py``. Where that draws an option at random, because the response
names none, the answer is wrong here. (lmms-eval's copy differs since 0.7: there "USA" names option A.)
"""

import re
from collections.abc import Mapping, Sequence

_ENDS = (",", ".", "!", "?", ";", ":", "'")
_LONG = 5  # words of a response above which the text of an option is looked for
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_THOUSANDS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")

Value = str | float


def mmmu_option(response: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that ``response`` names last, None if it names none.

    options: letter -> text.
    """
    for sign in _ENDS:
        response = response.strip(sign)
    response = f" {response} "
    for form in ("({})", " {} "):
        places = {letter: response.rfind(form.format(letter)) for letter in options}
        if named := _last(places):
            return named
    if len(response.split()) <= _LONG:
        return None
    return _last({letter: response.lower().rfind(text.lower()) for letter, text in options.items()})


def _last(places: Mapping[str, int]) -> str | None:
    """The letter found furthest to the right, the first of those at the same place, None if none is found."""
    best = max(places, key=lambda letter: places[letter], default=None)
    return best if best is not None and places[best] >= 0 else None


def mmmu_open(response: str, references: Sequence[str]) -> bool:
    """Whether one of ``references`` is a number that an open response gives, or a text within what it says at last."""
    wanted = [value for reference in references for value in _normalise(reference)]
    return any(_is_met(said, wanted) for said in open_values(response))


def _is_met(said: Value, wanted: Sequence[Value]) -> bool:
    if isinstance(said, str):
        return any(isinstance(value, str) and value in said for value in wanted)
    return said in wanted


def open_values(response: str) -> set[Value]:
    """The texts and numbers that an open response may mean."""
    texts = _key_parts(response.strip().strip(".").lower())
    numbers = [number for text in texts for number in _numbers(text)]
    return {value for text in (*texts, *numbers) for value in _normalise(text)}


def _key_parts(response: str) -> list[str]:
    """What stands behind the words that announce an answer, in every line; all of it if nowhere is any."""
    parts = []
    lines = response.split("\n")
    for number, line in enumerate(lines):
        keys = (*_KEYS, "=") if number == len(lines) - 1 else _KEYS
        shortest = ""
        for key in keys:
            tail = line.split(key)[-1].strip()
            if key in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in _ENDS:
            parts.append(shortest)
    return parts or [response]


def _numbers(text: str) -> list[str]:
    return [number for pattern in (_THOUSANDS, _SCIENTIFIC, _PLAIN) for number in pattern.findall(text)]


def _normalise(text: str) -> list[Value]:
    """A number to two decimals, else the text in lower case; a single letter must have a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
