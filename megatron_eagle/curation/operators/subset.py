"""A smaller share of large sources: so many samples of each, drawn evenly from clusters of their pictures.

Eagle 2 took about 20 000 of a source so; it found it good for charts, mathematics, medicine and documents, and poor for
natural scenes. The report shows the clusters.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Count, Flag, Positive, Range
from megatron_eagle.config.schema import meant
from megatron_eagle.curation.operator import Row, SetOperator, Step, Verdict
from megatron_eagle.curation.operators.embeddings import require_vectors
from megatron_eagle.curation.sample import Finding, Sample
from megatron_eagle.curation.selection import (
    Clusters,
    Method,
    cluster,
    coverage,
    draw_balanced,
    draw_random,
    farthest_first,
    need_faiss,
)
from megatron_eagle.curation.vectors import StoredRows, Vectors, VectorStore
from megatron_eagle.errors import UserError

NATURAL = ("general", "general-vqa", "caption", "captioning", "grounding", "natural")  # categories of such pictures
POOR = 0.25  # separation below which clusters hardly differ; random vectors have up to 0.21 (25 a cluster)
PER_CLUSTER = 10  # samples a cluster has on average, unless the plan says how many clusters
GALLERY = 6  # pictures of a cluster in the report
Target = Annotated[int, BeforeValidator(Range(1, whole=True))]


@dataclass(frozen=True, config=STRICT)
class Operator(SetOperator):
    """targets: samples to keep, by source or, with ``by: category``, by category; others stay whole.

    method: a balanced draw over ``clusters``, a ``random`` one, or a ``coreset`` (farthest points first; a pass over a
    group for each sample that is kept). clusters: of each group; null: one for ten samples kept, and 2 at least.
    compare: also say how well the other methods would cover the group. galleries: clusters of a group in the report.
    """

    needs: ClassVar[tuple[str, ...]] = ("embeddings",)
    holds: ClassVar[int] = 7000  # two copies of a vector of 512, a third of those that clusters are made by, keys

    targets: Mapping[str, Target]
    by: Literal["source", "category"] = "source"
    method: Method = "clusters"
    clusters: Positive | None = None
    seed: Count = 0
    compare: Flag = False
    galleries: Count = 12

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("targets are empty: nothing is selected")

    def check(self, categories: Mapping[str, str], benchmarks: Sequence[str]) -> None:
        """ValueError if a target is of no source or category that there is."""
        known = list(dict.fromkeys(categories if self.by == "source" else categories.values()))
        for name in self.targets:
            if name not in known:
                hint = meant(name, known)
                raise ValueError(f"targets: {self.by} '{name}' does not exist; there are {', '.join(known)}{hint}")

    def check_earlier(self, earlier: Mapping[str, Step]) -> None:
        """ValueError if the vectors that are clusters are made of are not made, or not of a target."""
        require_vectors(self.name, earlier, "images")
        blind = set(self.targets) - earlier["embeddings"].sources if self.by == "source" else set()
        if blind:
            raise ValueError(f"targets: 'embeddings' is not applied to {', '.join(sorted(blind))}")

    def prepare(self, folder: Path) -> None:
        """UserError if faiss is wanted and missing."""
        if self.method == "clusters" or self.compare:
            need_faiss()

    def value(self, sample: Sample) -> Any:
        """Keys of its pictures' vectors and where they lie; empty without a picture."""
        if (sample.source if self.by == "source" else sample.category) not in self.targets:
            return None
        note = sample.notes.get("embeddings", {})
        keys = note.get("images", [])[: len(sample.images)]
        return [keys, note["image_store"]] if keys else [[], ""]

    def decide(self, rows: Iterator[Row]) -> Iterator[Verdict]:
        """Of each group those that are left; UserError if a target exceeds what there is."""
        groups: dict[str, list[Row]] = {name: [] for name in self.targets}
        for row in rows:
            groups[row.key[0] if self.by == "source" else row.category].append(row)
        for name, group in groups.items():
            if len(group) < self.targets[name]:
                wanted = f"{self.targets[name]} samples of {self.by} '{name}' are wanted"
                raise UserError(f"operator 'subset': {wanted}, and {len(group)} are left by the operators before it")
        for name, group in groups.items():
            yield from self._group(name, group)

    def _group(self, name: str, group: list[Row]) -> Iterator[Verdict]:
        """Samples without a picture are drawn at random, in proportion."""
        target = self.targets[name]
        seen = [row for row in group if row.value[0]]
        blind = [row for row in group if not row.value[0]]
        of_seen = min(len(seen), max(target - len(blind), round(target * len(seen) / len(group))))
        sources = list(dict.fromkeys(row.key[0] for row in group))
        yield from self._drawn(name, sources, seen, of_seen)
        kept = set(draw_random(len(blind), target - of_seen, self.seed).tolist())
        for number, row in enumerate(blind):
            if number not in kept:
                yield Verdict(row.key, Finding("left", "not drawn", f"one of {len(blind)} without a picture"))

    def _drawn(self, name: str, sources: list[str], group: list[Row], target: int) -> Iterator[Verdict]:
        if not group or target == len(group):
            return
        if not target:
            yield from (Verdict(row.key, Finding("left", "not drawn")) for row in group)
            return
        vectors = StoredRows(VectorStore(Path(group[0].value[1])), [row.value[0] for row in group])[0 : len(group)]
        found = self._clusters(vectors, target) if self.method == "clusters" or self.compare else None
        chosen = self._chosen(self.method, vectors, found, target)
        for source in sources:
            yield from (
                Verdict((source, None), finding) for finding in self._notes(name, group, vectors, found, chosen)
            )
        shown = self._shown(name, found, chosen) if self.method == "clusters" and found is not None else {}
        taken = set(chosen.tolist())
        for number, row in enumerate(group):
            where = "" if found is None or self.method != "clusters" else f"cluster {int(found.of[number])} of {name}"
            if number in shown:
                yield Verdict(row.key, shown[number])
            if number not in taken:
                yield Verdict(row.key, Finding("left", "not drawn", where))

    def _clusters(self, vectors: Vectors, target: int) -> Clusters:
        wanted = self.clusters or max(2, target // PER_CLUSTER)
        if wanted > len(vectors):
            raise UserError(f"operator 'subset': {wanted} clusters are wanted of {len(vectors)} samples")
        return cluster(vectors, wanted, self.seed)

    def _chosen(self, method: Method, vectors: Vectors, found: Clusters | None, target: int) -> NDArray[np.int64]:
        if method == "clusters":
            assert found is not None
            return draw_balanced(found.of, target, self.seed)
        if method == "random":
            return draw_random(len(vectors), target, self.seed)
        return farthest_first(vectors, target, self.seed)

    def _notes(
        self, name: str, group: list[Row], vectors: Vectors, found: Clusters | None, chosen: NDArray[np.int64]
    ) -> Iterator[Finding]:
        """What is said of the group as a whole."""
        detail = f"{len(chosen)} of {len(group)} of {name} by {self.method}"
        if found is not None and self.method == "clusters":
            sizes = np.bincount(found.of, minlength=len(found.centres))
            detail += f", {len(sizes)} clusters of {sizes.min()} to {sizes.max()}, separation {found.separation:.3f}"
        yield Finding("noted", "subset", detail, scores={"kept": len(chosen), "of": len(group)})
        natural = [category for category in dict.fromkeys(row.category for row in group) if category in NATURAL]
        if found is not None and self.method == "clusters" and (natural or found.separation < POOR):
            why = f"category {natural[0]}" if natural else f"separation {found.separation:.3f} < {POOR:g}"
            detail = f"{name}: {why}; look at the clusters and compare with method: random"
            yield Finding("noted", "clusters may follow natural scenes, where Eagle 2 found them poor", detail)
        if self.compare:
            methods: tuple[Method, ...] = ("clusters", "random", "coreset")
            parts = []
            for method in methods:
                own = chosen if method == self.method else self._chosen(method, vectors, found, len(chosen))
                parts.append(f"{method} {coverage(vectors, own, self.seed):.4f}")
            detail = f"{name}: mean cosine of a picture with the nearest that is kept: {', '.join(parts)}"
            yield Finding("noted", "methods compared", detail)

    def _shown(self, name: str, found: Clusters, chosen: NDArray[np.int64]) -> dict[int, Finding]:
        """The samples nearest to the centres of the largest clusters, for the report."""
        sizes = np.bincount(found.of, minlength=len(found.centres))
        drawn = np.bincount(found.of[chosen], minlength=len(found.centres))
        shown: dict[int, Finding] = {}
        for number in np.argsort(-sizes, kind="stable")[: self.galleries].tolist():
            members = np.flatnonzero(found.of == number)
            gallery = f"cluster {number} of {name}: {sizes[number]} samples, {drawn[number]} drawn"
            for one in members[np.argsort(-found.cosines[members], kind="stable")[:GALLERY]].tolist():
                scores = {"cosine": round(float(found.cosines[one]), 4)}
                shown[one] = Finding("noted", "nearest to a centre", gallery, scores=scores, beside=(), gallery=gallery)
        return shown
