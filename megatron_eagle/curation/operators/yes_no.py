"""Yes or no is asked and a number given: question and answer are of different kinds."""

import re

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.curation.operator import ExchangeRule
from megatron_eagle.curation.questions import asking_sentence, asks_yes_no
from megatron_eagle.curation.sample import Exchange

_NUMBER_ALONE = re.compile(r"\W*\d[\d,.]*\s*(?:%|percent)?\W*")


@dataclass(frozen=True, config=STRICT)
class Operator(ExchangeRule):
    """No settings."""

    def fault(self, exchange: Exchange) -> tuple[str, str] | None:
        """An answer that is a number and nothing else."""
        if _NUMBER_ALONE.fullmatch(exchange.answer) and asks_yes_no(exchange.question):
            return "yes or no is asked, a number given", f"{asking_sentence(exchange.question)[:80]} {exchange.answer}"
        return None
