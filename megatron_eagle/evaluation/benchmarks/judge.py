"""What only a judge can tell, asked of a model behind an OpenAI-compatible endpoint; its answers are kept on disk.

MMVet: how right an answer is, from 0 to 1, by its reference, in which ``<AND>`` joins what must all be said and
``<OR>`` what is as good (arXiv 2308.02490). MathVista: the value that an answer gives, which is then compared by the
rule (arXiv 2310.02255). The papers ask GPT-4 with examples; the words here are our own, so values are comparable
between models that one judge saw, and near the published ones at best. Where the judge gives no usable answer, the
question stays undecided and counts as wrong; nothing is drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from megatron_eagle.endpoint.question import Question as Asked
from megatron_eagle.endpoint.question import Reply, ask_about
from megatron_eagle.endpoint.queue import Queue
from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark
from megatron_eagle.evaluation.benchmarks.entry import Question
from megatron_eagle.evaluation.benchmarks.scoring import Scored, points

GRADE = """An answer to a question about a picture is graded by a reference. The grade is a number from 0.0 (nothing \
of it is right) to 1.0 (all of it is right), in steps of 0.1. In the reference, <AND> joins parts that must all be in \
the answer and <OR> joins alternatives of which one is enough. Different words for the same thing are right. Reply \
with JSON only: {"grade": 0.0}."""
EXTRACT = """An answer to a question ends with, or contains, a value: an option's letter, a number or a list. Find the \
value that the answer gives, in the form that the question asks for; do not solve the question and do not correct the \
answer. If it gives none, the value is an empty text. Reply with JSON only: {"value": "..."}."""
TOKENS = 256  # of a judgement


def judged(benchmark: Benchmark, scored: Sequence[Scored], queue: Queue) -> list[Scored]:
    """The same entries with the points that the judge gave to those that were undecided."""
    given = {
        number: _points(benchmark, scored[number], reply) for number, reply in queue.ask(_questions(benchmark, scored))
    }
    return [replace(one, points=given.get(number, one.points)) for number, one in enumerate(scored)]


def _questions(benchmark: Benchmark, scored: Sequence[Scored]) -> Iterator[tuple[int, Asked | Reply]]:
    for number, one in enumerate(scored):
        if one.points is None and one.entry.question is not None:
            grades = benchmark.rule == "judge"
            words = _words(GRADE if grades else EXTRACT, one.entry.question, one.answer, reference=grades)
            yield number, Asked(ask_about(words), ("grade",) if grades else ("value",), TOKENS)


def _words(task: str, question: Question, answer: str, *, reference: bool) -> str:
    parts = [task, f"Question: {question.text.replace('<image>', '').strip()}"]
    if reference:
        parts.append(f"Reference: {' <OR> '.join(question.references)}")
    return "\n\n".join([*parts, f"Answer: {answer}"])


def _points(benchmark: Benchmark, one: Scored, reply: Reply) -> float | None:
    """In [0, 1]; None if the reply has no usable judgement."""
    said: dict[str, Any] = reply.data or {}
    if benchmark.rule == "judge":
        grade = said.get("grade")
        known = isinstance(grade, int | float) and not isinstance(grade, bool) and 0 <= grade <= 1
        return float(grade) if known and grade is not None else None
    if not isinstance(said.get("value"), str | int | float) or one.entry.question is None:
        return None
    found = points(benchmark, one.entry, one.entry.question, str(said["value"]))
    return 0.0 if found is None else found
