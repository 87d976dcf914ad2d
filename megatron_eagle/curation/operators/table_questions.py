"""Questions about a table that a sample knows: one in Markdown in an answer (chart to table), or as data beside it.

Rule-based, as Eagle 2 makes questions of tables and charts; answers are exact and have the table's own digits.
"""

import random
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Count, Positive
from megatron_eagle.curation.operator import SampleOperator
from megatron_eagle.curation.questions import normal
from megatron_eagle.curation.sample import Finding, Sample, added_exchanges
from megatron_eagle.curation.tables import KINDS, Kind, Table, table_exchanges, table_in, table_of

TRIES = 8  # for each question that is wanted


@dataclass(frozen=True, config=STRICT)
class Operator(SampleOperator):
    """most: questions added to a sample. kinds: of questions. seed: of the choice, with the sample's id.

    key: of the record, below which a table may stand as ``{"table": {"columns": [...], "rows": [[...], ...]}}``.
    """

    most: Positive = 3
    kinds: tuple[Kind, ...] = KINDS
    seed: Count = 0
    key: str = "metadata"

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """Added questions and answers, none that are there already."""
        turns = sample.conversation.turns
        table = self._table(sample)
        if table is None or turns[-1].role != "assistant":
            return ()
        return added_exchanges(len(turns), self._chosen(table, sample))

    def _chosen(self, table: Table, sample: Sample) -> Iterator[tuple[str, str, Finding]]:
        choose = random.Random(f"{self.seed}/{sample.conversation.id}")
        asked = {normal(one.question) for one in sample.exchanges}
        many = 0
        for tried, (kind, question, answer) in enumerate(table_exchanges(table, self.kinds, choose)):
            if many == self.most or tried == TRIES * self.most:
                return
            if question and normal(question) not in asked:
                asked.add(normal(question))
                many += 1
                yield question, answer, Finding("noted", f"asked of a table: {kind}")

    def _table(self, sample: Sample) -> Table | None:
        beside: Any = sample.conversation.extra.get(self.key)
        found = table_of(beside.get("table")) if isinstance(beside, dict) else None
        return found or next(filter(None, (table_in(one.answer) for one in sample.exchanges)), None)
