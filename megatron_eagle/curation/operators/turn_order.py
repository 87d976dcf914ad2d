"""Turns that are not question, answer, question, answer: what a model would learn from them is when not to answer."""

from collections.abc import Iterable

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.curation.operator import SampleOperator
from megatron_eagle.curation.sample import Finding, Sample


@dataclass(frozen=True, config=STRICT)
class Operator(SampleOperator):
    """No settings. What a tool returned (``observation``) counts as a question."""

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """The first turn out of order."""
        turns = sample.conversation.turns
        begin = 1 if turns[0].role == "system" else 0
        for number, turn in enumerate(turns[begin:], begin + 1):
            answers = turn.role == "assistant"
            if answers != ((number - begin) % 2 == 0):
                before = turns[number - 2].role if number > begin + 1 else "the beginning"
                yield Finding(
                    "rejected", "turns are out of order", f"turn {number}, from {turn.role}, follows {before}"
                )
                return
        if turns[-1].role != "assistant":
            yield Finding("rejected", "the last question has no answer", f"turn {len(turns)} is from {turns[-1].role}")
