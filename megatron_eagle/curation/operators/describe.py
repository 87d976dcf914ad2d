"""Detailed descriptions of images by a model, as one more question and answer."""

import random
from collections.abc import Iterator
from typing import ClassVar

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Positive, Share
from megatron_eagle.curation.asking import Ask, AskingOperator, Draft, drawn, pictures_of
from megatron_eagle.curation.sample import Sample
from megatron_eagle.curation.tasks import task_of
from megatron_eagle.endpoint.question import Reply

WORDS = (
    "Describe the picture in detail: what is there, where, in which colours, and every text that can be read. Say "
    "nothing that cannot be seen. Reply with the description alone."
)
QUESTIONS = (
    "Describe the image in detail.",
    "What is shown in the image? Give a detailed description.",
    "Write a detailed caption for this image.",
    "Describe everything that can be seen in the image.",
)


@dataclass(frozen=True, config=STRICT)
class Operator(AskingOperator):
    """share: of the samples with one image and no description yet, drawn by their ids. least: words of one."""

    most_tokens: ClassVar[int] = 1024

    share: Share = 1.0
    least: Positive = 20

    def asks(self, sample: Sample) -> Iterator[Ask]:
        """One, if there is no description."""
        turns = sample.conversation.turns
        described = any(task_of(one.question, one.answer) == "caption" for one in sample.exchanges)
        wanted = len(sample.images) == 1 and not sample.videos and turns[-1].role == "assistant" and not described
        if wanted and drawn(self.share, self.name, sample.conversation.id):
            asked = random.Random(sample.conversation.id).choice(QUESTIONS)
            yield Ask(0, WORDS, pictures_of(sample), {"question": asked})

    def draft(self, ask: Ask, reply: Reply) -> Draft:
        """The description, if it is one."""
        text = reply.text.strip()
        if len(text.split()) < self.least:
            return Draft("nothing", "the description is too short", text[:150])
        return Draft("add", "description added", "", None, (ask.about or {})["question"], text)
