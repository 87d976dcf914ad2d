"""Questions that hold their own answer, so that nothing has to be looked at."""

import re

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Positive, Share
from megatron_eagle.curation.operator import ExchangeRule
from megatron_eagle.curation.questions import asking_sentence, chosen_letter, normal, options_of, works_on_text
from megatron_eagle.curation.sample import Exchange

_STATED = re.compile(r"\b(?:answer|solution)(?: is|\s*[:=])\s*([^\n?!)]{1,80})", re.I)
_FILLERS = frozenset((
    "the", "a", "an", "is", "are", "was", "were", "it", "there", "this", "that", "of", "in", "on", "to", "has", "have",
    "does", "do", "its", "be", "i", "see", "picture", "image", "shown", "many", "much", "what", "which", "how",
))  # fmt: skip
_SENTENCE = 10  # words of an answer that may say what the question says


@dataclass(frozen=True, config=STRICT)
class Operator(ExchangeRule):
    """copied: an answer of so many words or more must not stand in its question and be ``share`` of it."""

    copied: Positive = 8
    share: Share = 0.5

    def fault(self, exchange: Exchange) -> tuple[str, str] | None:
        """An answer that is told, copied, or made of the question's own words."""
        question, answer = exchange.question, normal(exchange.answer)
        if not answer or works_on_text(question):
            return None
        options = options_of(question)
        letter = (chosen_letter(exchange.answer, options) or "").lower() if options else ""
        for match in _STATED.finditer(question):
            stated = normal(re.split(r"\.(?:\s|$)", match[1])[0])
            if stated and stated in (answer, letter):
                return "the question tells the answer", match[0][:100]
        asked, words = normal(question), answer.split()
        if len(words) >= self.copied and answer in asked and len(words) >= self.share * len(asked.split()):
            return "the answer stands in the question", exchange.answer[:100]
        sentence = asking_sentence(question)
        content = [word for word in words if word not in _FILLERS]
        if not content or len(words) > _SENTENCE or _offers(sentence) or options_of(question):
            return None
        if set(content) <= set(normal(sentence).split()):
            return "the answer says nothing that the question does not", f"{sentence[:80]} {exchange.answer[:60]}"
        return None


def _offers(sentence: str) -> bool:
    """Whether a sentence is no plain wh-question: one that offers alternatives may be answered by its own words."""
    plain = re.match(r"(?:what|which|who|whose|where|when|how)\b", sentence, re.I)
    return plain is None or re.search(r"\b(?:or|and|more|between|than)\b|[,:\"“”|]", sentence, re.I) is not None
