"""Answers that say nothing: blanks, dots, the names of missing values."""

import re

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.curation.operator import ExchangeRule
from megatron_eagle.curation.questions import normal, options_of
from megatron_eagle.curation.sample import Exchange
from megatron_eagle.curation.tasks import Task, task_of

_BLANK = re.compile(r"[\s.…?_*\-–—]*")
_MISSING = frozenset({"n a", "na", "nan", "null", "nil", "none", "undefined"})
TELLING: tuple[Task, ...] = ("caption", "reasoning")  # "none" tells nothing here, and is an answer elsewhere


@dataclass(frozen=True, config=STRICT)
class Operator(ExchangeRule):
    """No settings. A missing value's name counts as an answer where the question names it or lists options."""

    def fault(self, exchange: Exchange) -> tuple[str, str] | None:
        """Nothing said."""
        said = normal(exchange.answer)
        asked = exchange.question
        named = said and f" {said} " in f" {normal(asked)} "
        none = said == "none" and task_of(asked, "") not in TELLING
        missing = said in _MISSING and not named and not options_of(asked) and not none
        return (
            ("the answer is empty", repr(exchange.answer[:40]))
            if missing or _BLANK.fullmatch(exchange.answer)
            else None
        )
