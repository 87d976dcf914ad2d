"""Answers in which an assistant declines, or says that it sees no image: left over from models that wrote the data."""

import re

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.curation.operator import ExchangeRule
from megatron_eagle.curation.questions import works_on_text
from megatron_eagle.curation.sample import Exchange

_NOT = r"(?:cannot|(?:can|could|won)(?:'t| not)|couldn't|(?:am |'m )?(?:unable|not able) to)"
_HAVE = r"(?:do not|don't) have (?:the )?(?:ability|access|capability|permission)"
_VERB = (
    r"(?:assist|help|provide|see|view|access|identify|process|describe|comply|answer|fulfil|recogni[sz]e|analy[sz]e"
    r"|do that|discuss)"
)
_MORE = r"(?:complete|continue|create|determine|engage|fulfill|generate|make out|offer|support)"  # after an apology
_REFUSALS = re.compile(
    r"\bas an? (?:\w+ )?(?:ai|language model|text-based|artificial)\b"
    r"|\bi(?: am|'m)? (?:just )?an? (?:ai|language model)\b"
    rf"|\b(?:i|we)\s?{_NOT} (?:\w+ )?{_VERB}\b|\b(?:i|we) {_HAVE}\b|\bnot possible for me to\b"
    rf"|\b(?:sorry|apologi[sz]e|apologies|unfortunately)\b[,;]? (?:but )?(?:{_NOT} (?:\w+ )?{_VERB}\b|{_HAVE}\b)"
    rf"|\b(?:sorry|afraid|apologi[sz]e|unfortunately)\b[^.]{{0,60}}\b(?:i|we)\s?{_NOT} (?:\w+ )?{_MORE}\b",
    re.I,
)


@dataclass(frozen=True, config=STRICT)
class Operator(ExchangeRule):
    """No settings. Only the beginning of an answer is looked at, and none that copies a text."""

    def fault(self, exchange: Exchange) -> tuple[str, str] | None:
        """The words of declining."""
        start = exchange.answer[:240].replace("’", "'")
        found = None if works_on_text(exchange.question) else _REFUSALS.search(start)
        return found and ("the answer is a refusal", start[:120])
