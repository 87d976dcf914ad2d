"""Intersection over union of stretches of time, for Charades-STA: its mean is mIoU.

Rule: lmms-eval's ``tasks/charades_sta/utils.py``, of which ``read_span`` reads an answer as ``extract_time`` does: the
first two times that a range joins, else the first two it finds, in sentences that say when something starts, ends or
happens if there are any.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

Span = tuple[float, float]

_EXAMPLE = "a specific example is : 20.8 - 30.0 seconds"
_SAYS_WHEN = ("start", "end", "happen")
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2})?"
_NUMBER = r"\d+(?:\.\d+)?"
_CLOCK_RANGE = re.compile(rf"\b({_CLOCK})\s*[–-]\s*({_CLOCK})\b")  # noqa: RUF001
_RANGE = re.compile(rf"({_NUMBER})\s*[–-]\s*({_NUMBER})")  # noqa: RUF001
_RANGE_OF_SECONDS = re.compile(rf"({_NUMBER})\s*s?\s*[–-]\s*({_NUMBER})\s*s?")  # noqa: RUF001
_A_CLOCK = re.compile(rf"\b({_CLOCK})\b")
_A_NUMBER = re.compile(rf"\b({_NUMBER})\b")


def read_span(text: str) -> Span | None:
    """Start and end in seconds, in order, that an answer names; None if it names none."""
    sentences = re.split(r"[!?\n]", text.lower().replace(_EXAMPLE, "").replace("to", "-"))
    said = [sentence for sentence in sentences if any(word in sentence for word in _SAYS_WHEN)] or sentences
    found = (
        _range(said, _CLOCK_RANGE, _seconds)
        or _range(said, _RANGE, float)
        or _pair(chain.from_iterable(_A_CLOCK.findall(sentence) for sentence in said), _seconds)
        or _pair(chain.from_iterable(_A_NUMBER.findall(sentence)[:1] for sentence in said), float)
        or _range(said, _RANGE_OF_SECONDS, float)
    )
    return None if found is None else (min(found), max(found))


def _range(sentences: Iterable[str], pattern: re.Pattern[str], read: Callable[[str], float]) -> Span | None:
    for sentence in sentences:
        if found := pattern.search(sentence):
            return read(found[1]), read(found[2])
    return None


def _pair(times: Iterable[str], read: Callable[[str], float]) -> Span | None:
    first = [read(time) for time, _ in zip(times, range(2), strict=False)]
    return (first[0], first[1]) if len(first) == 2 else None


def _seconds(clock: str) -> float:
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def span_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Shared time over time from the first start to the last end, 0 if that is none."""
    covered = max(one[1], other[1]) - min(one[0], other[0])
    return max(min(one[1], other[1]) - max(one[0], other[0]), 0.0) / covered if covered > 0 else 0.0
