"""Multiple choice whose answer is none of the options: question and answer are of different kinds."""

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Positive
from megatron_eagle.curation.operator import ExchangeRule
from megatron_eagle.curation.questions import chosen_letter, normal, options_of
from megatron_eagle.curation.sample import Exchange


@dataclass(frozen=True, config=STRICT)
class Operator(ExchangeRule):
    """short: an answer of at most so many words that names no letter must be an option's text."""

    short: Positive = 4

    def fault(self, exchange: Exchange) -> tuple[str, str] | None:
        """The letter first, then the text beside it or in its place."""
        options = options_of(exchange.question)
        if not options:
            return None
        letters = f"{len(options)} options, A to {list(options)[-1]}"
        letter, said = chosen_letter(exchange.answer, options), normal(exchange.answer)
        texts = {key: normal(text) for key, text in options.items()}
        if letter is not None and letter not in options:
            return "the answer is no option", f"{letter} of {letters}"
        if letter is not None:
            others = [key for key, text in texts.items() if said == f"{letter.lower()} {text}" and key != letter]
            return ("letter and text are of different options", f"{exchange.answer[:60]}") if others else None
        if len(said.split()) <= self.short and not any(
            text and text in said or said and said in text for text in texts.values()
        ):
            return "the answer is no option", f"{exchange.answer[:60]!r} of {letters}"
        return None
