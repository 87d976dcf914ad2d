"""Questions that a record's metadata answer: who painted it, where it was taken, in which year."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.curation.operator import SampleOperator
from megatron_eagle.curation.questions import normal
from megatron_eagle.curation.sample import Finding, Sample, added_exchanges

MOST = 200  # characters of a value that is an answer


@dataclass(frozen=True, config=STRICT)
class Operator(SampleOperator):
    """questions: by the field that answers them, such as ``artist: Who painted this?``. key: of the record, below which
    the fields stand. A field that is missing, empty or no text or number is not asked about."""

    questions: dict[str, str]
    key: str = "metadata"

    def __post_init__(self) -> None:
        if not self.questions or not all(text.strip() for text in self.questions.values()):
            raise ValueError(f"questions has no question, or an empty one: {self.questions}")

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """Added questions and answers, none that are there already."""
        turns, beside = sample.conversation.turns, sample.conversation.extra.get(self.key)
        if not isinstance(beside, dict) or turns[-1].role != "assistant":
            return ()
        return added_exchanges(len(turns), self._chosen(beside, {normal(one.question) for one in sample.exchanges}))

    def _chosen(self, beside: dict[str, Any], asked: set[str]) -> Iterator[tuple[str, str, Finding]]:
        for field, question in self.questions.items():
            answer = _text(beside.get(field))
            if answer and normal(question) not in asked:
                yield question, answer, Finding("noted", f"asked of metadata: {field}"[:100])


def _text(value: Any) -> str:
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    return text if len(text) <= MOST else ""
