"""Short answers made whole sentences by a model, which must still hold every word of the answer."""

from collections.abc import Iterator
from typing import ClassVar

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Share
from megatron_eagle.curation.asking import Ask, AskingOperator, Draft, ask_of, drawn_exchanges, text_of
from megatron_eagle.curation.operators.formats import states_format
from megatron_eagle.curation.questions import exact
from megatron_eagle.curation.sample import Sample
from megatron_eagle.curation.tasks import Task
from megatron_eagle.data.sample.markers import escape_marks
from megatron_eagle.endpoint.question import Reply

WORDS = (
    "Question about the {picture}: {question}\nAnswer: {answer}\nWrite the answer as one natural sentence that says "
    'the same and nothing more, and keeps its words. Reply with JSON alone: {{"sentence": "..."}}'
)
SHORT, LONGEST = 5, 60  # words of an answer that is expanded, and of the sentence


@dataclass(frozen=True, config=STRICT)
class Operator(AskingOperator):
    """share: of the short answers, drawn by the sample's id. tasks: that are answered shortly.

    Where the question states a short format ("Answer with a number"), the answer stays.
    """

    keys: ClassVar[tuple[str, ...] | None] = ("sentence",)
    most_tokens: ClassVar[int] = 200

    share: Share = 1.0
    tasks: tuple[Task, ...] = ("short", "number", "yes_no")

    def asks(self, sample: Sample) -> Iterator[Ask]:
        """One for each short answer."""
        for one in drawn_exchanges(sample, self.name, self.tasks, self.share):
            if len(one.answer.split()) <= SHORT and not states_format(one.question):
                yield ask_of(sample, one, WORDS, {"question": one.question, "answer": one.answer})

    def draft(self, ask: Ask, reply: Reply) -> Draft:
        """The sentence, if the answer is in it."""
        question, answer = (ask.about or {})["question"], (ask.about or {})["answer"]
        sentence = text_of(reply.data, "sentence")
        kept, wanted = exact(sentence), exact(answer)
        at_first = wanted in (("yes",), ("no",))  # "there is no doubt" says yes
        if not set(wanted) <= set(kept[:1] if at_first else kept) or not len(wanted) < len(kept) <= LONGEST:
            return Draft("nothing", "the sentence does not hold the answer", sentence[:150], ask.turn)
        changes = ((ask.turn, escape_marks(sentence)),)
        return Draft("change", "short answer expanded", "", ask.turn, question, sentence, changes)
