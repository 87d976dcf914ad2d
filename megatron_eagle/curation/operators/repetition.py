"""Answers that say the same again and again, as models that got stuck do (Eagle 2's filter "repeated text")."""

import re
from collections import Counter

import numpy as np
from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Positive
from megatron_eagle.curation.operator import ExchangeRule
from megatron_eagle.curation.sample import Exchange

_CODE = re.compile(r"```.*?(?:```|\Z)|\\begin\{.*?\\end\{\w+\*?\}", re.DOTALL)


@dataclass(frozen=True, config=STRICT)
class Operator(ExchangeRule):
    """same_lines: how often a line or a sentence may stand in an answer. in_a_row: how often a phrase, behind itself.

    longest: words of such a phrase. letters: lines of fewer are not looked at. Code, formulas and tables never are.
    """

    same_lines: Positive = 2
    in_a_row: Positive = 4
    longest: Positive = 40
    letters: Positive = 12

    def fault(self, exchange: Exchange) -> tuple[str, str] | None:
        """Lines first, then phrases."""
        text = "\n".join(line for line in _CODE.sub("\n", exchange.answer).splitlines() if line.count("|") < 2)
        parts = [part.strip() for part in re.split(r"\n+|(?<=[.!?])\s+", text)]
        counts = Counter(part for part in parts if sum(map(str.isalpha, part)) >= self.letters)
        for part, count in counts.most_common(1):
            if count > self.same_lines:
                return "a line stands several times", f"{count} times: {part[:100]}"
        words = re.findall(r"\w+", text.casefold())
        found = _longest_loop(words, self.in_a_row, self.longest)
        return found and ("a phrase is repeated in a row", f"{found[0]} times: {found[1][:100]}")


def _longest_loop(words: list[str], allowed: int, longest: int) -> tuple[int, str] | None:
    """(times, phrase) of the first phrase of letters that stands more than ``allowed`` times behind itself."""
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    if len(words) <= allowed or len(numbers) == len(words):
        return None
    series = np.array([numbers[word] for word in words])
    for period in range(1, min(longest, len(words) // (allowed + 1)) + 1):
        breaks = np.flatnonzero(np.concatenate(([True], series[period:] != series[:-period], [True])))
        runs = np.diff(breaks) - 1
        times = int(runs.max()) // period + 1
        start = int(breaks[runs.argmax()])
        phrase = words[start : start + period]
        if times > allowed and any(word.isalpha() for word in phrase):
            return times, " ".join(phrase)
    return None
