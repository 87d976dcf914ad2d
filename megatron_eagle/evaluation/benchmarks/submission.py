"""Files for servers that have the answers: DocVQA's and InfographicVQA's test sets, at rrc.cvc.uab.es.

Form: a list of ``{"questionId": 49153, "answer": "..."}`` over all questions, as lmms-eval's ``tasks/docvqa/utils.py``
writes it; a file's ``questionId`` is the server's number, whatever its ``index`` says. A question that could not be
read is answered with nothing.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark
from megatron_eagle.evaluation.benchmarks.entry import Entry
from megatron_eagle.evaluation.benchmarks.scoring import Scored

FILE = "submission.json"


def write_submission(benchmark: Benchmark, scored: Sequence[Scored], folder: Path) -> Path | None:
    """The file in ``folder`` to hand in, None if no form of one is known for ``benchmark``."""
    if benchmark.submission is None:
        return None
    lines = [{"questionId": _number(one.entry), "answer": one.answer} for one in scored]
    path = folder / FILE
    path.write_text(json.dumps(lines, ensure_ascii=False), encoding="utf-8")
    return path


def _number(entry: Entry) -> int | str:
    identity = entry.fields.get("questionId", entry.id)
    return int(identity) if identity.isdigit() else identity
