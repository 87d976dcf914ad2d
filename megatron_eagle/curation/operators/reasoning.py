"""Chain of thought before an answer: a model's own steps, kept where they come to the answer that is known.

The model is not told the answer, so that steps which lead to it are worth something.
"""

from collections.abc import Iterator
from typing import ClassVar

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Positive, Share
from megatron_eagle.curation.asking import Ask, AskingOperator, Draft, ask_of, drawn_exchanges, text_of
from megatron_eagle.curation.questions import chosen_letter, exact, options_of
from megatron_eagle.curation.sample import Sample
from megatron_eagle.curation.tables import number_of
from megatron_eagle.curation.tasks import Task
from megatron_eagle.data.sample.markers import escape_marks
from megatron_eagle.endpoint.question import Reply

WORDS = (
    "Question about the {picture}: {question}\nThink step by step, then answer in the format that the question asks "
    'for, or as shortly as possible. Reply with JSON alone: {{"steps": "your reasoning", "answer": "the bare answer"}}'
)
STATED = "Think step by step, then give the answer."


@dataclass(frozen=True, config=STRICT)
class Operator(AskingOperator):
    """share: of the questions, drawn by the sample's id. tasks: that are thought about. least: words of the steps.

    The question then says that steps are wanted, and the answer ends with the one that was there before.
    """

    keys: ClassVar[tuple[str, ...] | None] = ("steps", "answer")
    most_tokens: ClassVar[int] = 2048

    share: Share = 1.0
    tasks: tuple[Task, ...] = ("choice", "number")
    least: Positive = 8

    def asks(self, sample: Sample) -> Iterator[Ask]:
        """One for each question of these tasks."""
        turns = sample.conversation.turns
        for one in drawn_exchanges(sample, self.name, self.tasks, self.share):
            if turns[one.turn - 2].role == "user":
                about = {"question": one.question, "answer": one.answer, "asked": turns[one.turn - 2].text}
                yield ask_of(sample, one, WORDS, about)

    def draft(self, ask: Ask, reply: Reply) -> Draft:
        """Steps and answer, if it is the known one."""
        about = ask.about or {}
        steps, found = text_of(reply.data, "steps", lines=True), text_of(reply.data, "answer", number=True)
        known = about["answer"]
        if not same_answer(about["question"], found, known):
            return Draft(
                "nothing", "the model comes to another answer", f"{found[:80]!r}, not {known[:80]!r}", ask.turn
            )
        if len(steps.split()) < self.least:
            return Draft("nothing", "too few steps", steps[:150], ask.turn)
        answer = f"{steps}\n\nAnswer: {known}"
        changes = ((ask.turn - 1, f"{about['asked']}\n{STATED}"), (ask.turn, escape_marks(answer)))
        return Draft(
            "change", "chain of thought put before the answer", "", ask.turn, about["question"], answer, changes
        )


def same_answer(question: str, found: str, known: str) -> bool:
    """Whether two answers to a question are one: as numbers, as letters of its options, or as words."""
    options = options_of(question)
    if options:
        letters = [chosen_letter(one, options) for one in (found, known)]
        return letters[0] is not None and letters[0] == letters[1]
    numbers = [number_of(one.strip().rstrip(".")) for one in (found, known)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return bool(exact(known)) and exact(found) == exact(known)
