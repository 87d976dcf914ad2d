"""Things are to be counted and the answer has no digits: Eagle 2 asks for one answer format for one task."""

import re

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Positive
from megatron_eagle.curation.operator import ExchangeRule
from megatron_eagle.curation.questions import NUMBER_WORDS, asks_count
from megatron_eagle.curation.sample import Exchange

_IN_WORDS = re.compile(rf"\b(?:{'|'.join(NUMBER_WORDS)}|dozens?|hundreds?|several|many|few|lots?|couple)\b", re.I)
_NONE = re.compile(r"\W*(?:there (?:is|are|were) )?(?:none|nothing|nobody|no one|not any|no \w+)\b", re.I)


@dataclass(frozen=True, config=STRICT)
class Operator(ExchangeRule):
    """short: an answer of at most so many words needs a number; a longer one is at fault if it has one in words.

    "None" and "no dogs" are answers.
    """

    short: Positive = 4

    def fault(self, exchange: Exchange) -> tuple[str, str] | None:
        """A count without digits."""
        answer = exchange.answer
        if re.search(r"\d", answer) or not answer.strip() or not asks_count(exchange.question) or _NONE.match(answer):
            return None
        if _IN_WORDS.search(answer):
            return "a count in words", answer[:80]
        return ("a count without a number", answer[:80]) if len(answer.split()) <= self.short else None
