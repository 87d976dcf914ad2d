"""Answers that a model finds wrong, given the pictures and the question, are rejected."""

from collections.abc import Iterator
from typing import ClassVar

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Share
from megatron_eagle.curation.asking import Ask, AskingOperator, Draft, ask_of, drawn_exchanges
from megatron_eagle.curation.sample import Sample
from megatron_eagle.curation.tasks import TASKS, Task
from megatron_eagle.endpoint.question import Reply

WORDS = (
    "Question about the {picture}: {question}\nAnswer: {answer}\nIs the answer right, and can it be told from the "
    '{picture}? Reply with JSON alone: {{"right": true or false, "why": "a few words"}}'
)


@dataclass(frozen=True, config=STRICT)
class Operator(AskingOperator):
    """share: of the exchanges, drawn by the sample's id. tasks: that are looked at.

    An exchange about which the model says nothing of use stays, and that is noted.
    """

    keys: ClassVar[tuple[str, ...] | None] = ("right",)
    most_tokens: ClassVar[int] = 200

    share: Share = 1.0
    tasks: tuple[Task, ...] = TASKS

    def asks(self, sample: Sample) -> Iterator[Ask]:
        """One for each exchange."""
        for one in drawn_exchanges(sample, self.name, self.tasks, self.share):
            yield ask_of(sample, one, WORDS, {"question": one.question, "answer": one.answer})

    def draft(self, ask: Ask, reply: Reply) -> Draft:
        """A rejection, if the model says false."""
        data = reply.data or {}
        if data["right"] is True:
            return Draft("nothing", "a model finds it right", "", ask.turn)
        if data["right"] is False:
            return Draft(
                "reject", "a model finds it wrong", str(data.get("why", ""))[:150], ask.turn, **(ask.about or {})
            )
        return Draft("nothing", "no use of the answer: neither true nor false", str(data["right"])[:80], ask.turn)
