"""Questions about the story of a film, which a model writes from the descriptions of its chapters."""

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Positive
from megatron_eagle.curation.asking import Ask, AskingOperator, Draft
from megatron_eagle.curation.sample import Sample
from megatron_eagle.endpoint.question import Reply

CONTEXT = "These are descriptions of the chapters of a video.\n\n{chapters}\n\n"
WORDS = (
    "Write {most} questions about the whole video "
    "that need more than one chapter, or its course, to be answered, each with a full answer. Speak of the video, not "
    'of descriptions. Reply with JSON alone: {{"questions": [{{"question": "...", "answer": "..."}}]}}'
)
LEAST = 2


@dataclass(frozen=True, config=STRICT)
class Operator(AskingOperator):
    """most: questions of a film. A film of which fewer than two chapters could be described gets none."""

    needs: ClassVar[tuple[str, ...]] = ("chapters",)
    keys: ClassVar[tuple[str, ...] | None] = ("questions",)
    most_tokens: ClassVar[int] = 2048

    most: Positive = 3

    def asks(self, sample: Sample) -> Iterator[Ask]:
        """One, if there are chapters."""
        chapters = sample.notes.get("chapters", [])
        if len(chapters) >= LEAST and sample.conversation.turns[-1].role == "assistant":
            parts = (f"{start:.1f} to {end:.1f} seconds, {title}: {said}" for start, end, title, said in chapters)
            yield Ask(0, WORDS.format(most=self.most), context=CONTEXT.format(chapters="\n\n".join(parts)))

    def draft(self, ask: Ask, reply: Reply) -> Draft | tuple[Draft, ...]:
        """All questions, or none if one of them is none; each is judged by the same descriptions."""
        given: Any = (reply.data or {})["questions"]
        pairs = [_pair(one) for one in given] if isinstance(given, list) else []
        if not pairs or not all(question and answer for question, answer in pairs):
            return Draft("nothing", "no use of the answer: no list of questions and answers", str(given)[:150])
        return tuple(Draft("add", "question about the story added", "", None, *pair) for pair in pairs[: self.most])


def _pair(one: Any) -> tuple[str, str]:
    if not isinstance(one, dict):
        return "", ""
    question, answer = one.get("question"), one.get("answer")
    return (question.strip(), answer.strip()) if isinstance(question, str) and isinstance(answer, str) else ("", "")
