"""Yes or no, and HallusionBench's three accuracies.

Rule: VLMEvalKit's ``vlmeval/dataset/utils/yorn.py``, without its judge: an answer with both words or with neither is
wrong. HallusionBench (arXiv 2310.14566): aAcc of all questions, fAcc of figures and qAcc of questions, each of which
counts if everything asked about it is right. That a paper's single number is their mean is a convention.
"""

import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_PERIODS = 32  # the official code hands re.UNICODE to sub's count


def yes_or_no(answer: str) -> str | None:
    """ "Yes" or "No", whichever word is in ``answer``; None if both or neither is."""
    words = _without_punctuation(answer.lower()).split()
    yes, no = "yes" in words, "no" in words
    return None if yes == no else "Yes" if yes else "No"


def _without_punctuation(text: str) -> str:
    """Signs between words are removed, signs inside of them become spaces; none does in a text with 1,000 in it."""
    plain = text
    for sign in _PUNCTUATION:
        between = f"{sign} " in text or f" {sign}" in text or _COMMA_IN_NUMBER.search(text)
        plain = plain.replace(sign, "" if between else " ")
    return _LONE_PERIOD.sub("", plain, _PERIODS)


@dataclass(frozen=True)
class YesNo:
    """One scored question of HallusionBench, and what it belongs to."""

    right: bool
    subcategory: str
    set_id: str
    figure: str
    question: str


@dataclass(frozen=True)
class Hallusion:
    """Shares in [0, 1]."""

    all_questions: float
    figures: float
    questions: float

    @property
    def mean(self) -> float:
        return (self.all_questions + self.figures + self.questions) / 3


def hallusion(scored: Iterable[YesNo]) -> Hallusion:
    """The three accuracies of HallusionBench; there is at least one question."""
    rows = list(scored)
    return Hallusion(
        sum(row.right for row in rows) / len(rows),
        _whole((row.subcategory, row.set_id, row.figure, row.right) for row in rows),
        _whole((row.subcategory, row.set_id, row.question, row.right) for row in rows),
    )


def _whole(rows: Iterable[tuple[Hashable, Hashable, Hashable, bool]]) -> float:
    """The share of groups in which all is right."""
    groups: dict[Hashable, bool] = {}
    for *key, right in rows:
        groups[tuple(key)] = groups.get(tuple(key), True) and right
    return sum(groups.values()) / len(groups)
