r"""Looks at whole sources: which tasks they have, templates that dominate, one task in different formats.

The last two are failure signatures of Eagle 2: a model that writes ``\begin{align*}`` everywhere learnt it from a
source that did. Nothing is changed; what is found stands in the ledger without a sample, and in the report.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Positive, Share
from megatron_eagle.curation.operator import Row, SetOperator, Verdict
from megatron_eagle.curation.sample import Finding, Sample
from megatron_eagle.curation.tasks import TASKS, format_of, task_of

OPENING = 4  # words of an answer that make its template
LONG = 8  # words that an answer must have to follow one


@dataclass(frozen=True, config=STRICT)
class Operator(SetOperator):
    """template: share of a source's longer answers that may open alike. format: share that makes a format its own.

    least: answers that a source must have, of a task or in all, to be judged.
    """

    holds: ClassVar[int] = 0  # counts only

    template: Share = 0.2
    format: Share = 0.6
    least: Positive = 50

    def value(self, sample: Sample) -> Any:
        """Of each exchange: its task, the format of its answer, and how that opens."""
        tasks = [(task_of(one.question, one.answer), one) for one in sample.exchanges]
        return [(task, format_of(task, one.question, one.answer), opening(one.answer)) for task, one in tasks]

    def decide(self, rows: Iterator[Row]) -> Iterator[Verdict]:
        """Findings on sources."""
        openings: dict[str, Counter[str]] = {}
        formats: dict[str, dict[str, Counter[str]]] = {}
        for row in rows:
            source = row.key[0]
            for task, form, begin in row.value:
                formats.setdefault(task, {}).setdefault(source, Counter())[form] += 1
                if begin:
                    openings.setdefault(source, Counter())[begin] += 1
        for source in dict.fromkeys(source for sources in formats.values() for source in sources):
            tasks = {task: formats[task][source].total() for task in TASKS if source in formats.get(task, {})}
            detail = ", ".join(f"{task} {count}" for task, count in tasks.items())
            yield Verdict((source, None), Finding("noted", "tasks", detail))
        for source, counts in openings.items():
            yield from self._templates(source, counts)
        for task, sources in formats.items():
            yield from self._contradictions(task, sources)

    def _templates(self, source: str, counts: Counter[str]) -> Iterator[Verdict]:
        total = counts.total()
        for begin, count in counts.most_common(3) if total >= self.least else ():
            if count > self.template * total:
                detail = f"{count} of {total} longer answers begin {begin!r}"
                scores = {"share": round(count / total, 4)}
                yield Verdict((source, None), Finding("noted", "a template dominates", detail, scores=scores))

    def _contradictions(self, task: str, sources: dict[str, Counter[str]]) -> Iterator[Verdict]:
        own: dict[str, tuple[str, float]] = {}
        for source, counts in sources.items():
            form, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
            if counts.total() >= self.least and count >= self.format * counts.total():
                own[source] = (form, count / counts.total())
        for source, (form, share) in own.items():
            others = [f"{other} as {its!r}" for other, (its, _) in own.items() if its != form]
            if others:
                detail = f"{task}: {share:.0%} answered as {form!r}, {', '.join(others)}"
                yield Verdict((source, None), Finding("noted", "sources contradict each other", detail[:300]))


def opening(answer: str) -> str:
    """The first words of a longer answer, digits as one, or its LaTeX environment; empty if it is short."""
    words = answer.split()
    if answer.startswith("\\begin"):
        return words[0]
    return re.sub(r"\d+", "0", " ".join(words[:OPENING])) if len(words) >= LONG else ""
