"""Does a source add anything to what is trained on already? Eq. 1 of Eagle 2 for one source, as a run of two operators.

New and pool are records as ``data build`` reads them, finished curations or plans, whose sources bring their
categories along. The pool is compared with and never kept, as a benchmark is. What is asked once is cheap to ask again:
vectors are found by content.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_eagle.curation.engine import curate
from megatron_eagle.curation.output import KEPT, SAMPLES_FILE, SUMMARY_FILE, Summary, read_summary
from megatron_eagle.curation.plan import Plan, PlannedSource, load_plan
from megatron_eagle.errors import UserError


@dataclass(frozen=True)
class Admission:
    """new, pool: ``[CATEGORY=]PATH``, of records, of a finished curation or of a plan.

    embeddings, similarity: settings of the two operators. category: only sources of it.
    """

    new: str
    pool: tuple[str, ...]
    embeddings: dict[str, Any]
    similarity: dict[str, Any]
    categories: tuple[str, ...] = ()

    def plan(self) -> Plan:
        """What is run; UserError if a category is on one side only."""
        pool = [source for text in self.pool for source in sources_of(text)]
        new = self._wanted(sources_of(self.new))
        there = list(dict.fromkeys(source.category for source in pool))
        for source in new:
            if source.category not in there:
                raise UserError(
                    f"{self.new} is of category {source.category}, of which the pool has nothing; it has "
                    f"{', '.join(there)} (a category is given as CATEGORY=PATH)"
                )
        wanted = {source.category for source in new}
        pool = [replace(source, benchmark=True) for source in pool if source.category in wanted]
        named = _with_names([*new, *pool])
        names = [source.name for source in named if source.benchmark]
        operators = (
            {"use": "embeddings", **self.embeddings},
            {"use": "similarity", "pool": names, **self.similarity},
        )
        return Plan("admit", tuple(named), operators)

    def _wanted(self, sources: list[PlannedSource]) -> list[PlannedSource]:
        for one in self.categories:
            if one not in (there := list(dict.fromkeys(source.category for source in sources))):
                raise UserError(f"{self.new} has nothing of category {one}; it has {', '.join(there)}")
        return [source for source in sources if not self.categories or source.category in self.categories]


def admit(admission: Admission, out: Path, *, workers: int = 1) -> Summary:
    """Runs it; the summary's notes have the answer, ``out/report.html`` the best matches side by side."""
    return curate(admission.plan(), out, workers=workers)


def sources_of(text: str) -> list[PlannedSource]:
    """The sources that an argument means; UserError if there is nothing."""
    category, separator, rest = text.partition("=")
    path = Path(rest if separator and not Path(text).exists() else text)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        found = [source for source in load_plan(path).sources if not source.benchmark]
    elif (path / SUMMARY_FILE).is_file():
        found = [
            PlannedSource(source.name, str(path / KEPT / source.name / SAMPLES_FILE), source.category)
            for source in read_summary(path).sources
            if source.used
        ]
        if not found:
            raise UserError(f"nothing was kept in {path}")
    else:
        if not path.exists():
            raise UserError(f"{path} does not exist; records, a finished curation or a plan are wanted")
        name = path.parent.name if path.stem in ("samples", "records") else path.stem
        found = [PlannedSource(_plain(name), str(path))]
    return [replace(source, category=category) for source in found] if path != Path(text) else found


def _plain(name: str) -> str:
    kept = "".join(one if one.isascii() and (one.isalnum() or one in "._-") else "-" for one in name).lstrip("._-")
    return kept or "source"


def _with_names(sources: Sequence[PlannedSource]) -> list[PlannedSource]:
    """Names that differ: the second of one gets a number."""
    seen: set[str] = set()
    found = []
    for source in sources:
        name, number = source.name, 2
        while name in seen:
            name, number = f"{source.name}-{number}", number + 1
        seen.add(name)
        found.append(replace(source, name=name))
    return found
