"""Numbers more exact than the question or anything before it carries (Eagle 2's filter on numeric formatting)."""

import re

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Count
from megatron_eagle.curation.operator import ExchangeRule
from megatron_eagle.curation.questions import NUMBER_WORDS, works_on_text
from megatron_eagle.curation.sample import Exchange

_DECIMALS = re.compile(r"(?<![\d.\w])[-+]?\d[\d,]*\.(\d+)(?!\.?\d)")
_ASKED = re.compile(
    rf"\b(\d+|{'|'.join(NUMBER_WORDS)})[\s-]+(?:decimals?|(?:decimal )?places?|(?:significant )?(?:digits|figures))\b",
    re.I,
)
_BOX = re.compile(r"[\[(<]\s*[-+]?\d[\d.]*(?:\s*,\s*[-+]?\d[\d.]*){1,}\s*[\])>]")


@dataclass(frozen=True, config=STRICT)
class Operator(ExchangeRule):
    """most: digits after the point that are put up with if the question, or what stands before it, has no more.

    Coordinates and texts that are to be copied are not looked at.
    """

    most: Count = 3

    def fault(self, exchange: Exchange) -> tuple[str, str] | None:
        """The first number with too many."""
        if works_on_text(exchange.question):
            return None
        asked = f"{exchange.history}\n{exchange.question}"
        allowed = max([self.most, *_asked(exchange.question), *(len(found) for found in _DECIMALS.findall(asked))])
        for match in _DECIMALS.finditer(_BOX.sub(" ", exchange.answer)):
            if len(match[1]) > allowed:
                return "a number has too many decimals", f"{match[0][:60]} has {len(match[1])}, {allowed} are carried"
        return None


def _asked(question: str) -> list[int]:
    """Numbers of decimals that a question asks for."""
    return [int(one) if one.isdigit() else NUMBER_WORDS.index(one.lower()) for one in _ASKED.findall(question)]
