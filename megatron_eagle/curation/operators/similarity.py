"""What a source has in common with others of its category: Eq. 1 of Eagle 2, with the best matches side by side.

High is redundant. Samples without a picture or without a vector of their text take no part, and are counted. Nothing is
rejected: it is for people to say whether a source is worth its steps (``curate admit`` asks for one source).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Count, Fraction, Positive
from megatron_eagle.curation.operator import Row, SetOperator, Verdict
from megatron_eagle.curation.sample import Finding, Place, Sample, places_of
from megatron_eagle.curation.similarity import Matches, Negative, Pairs, best_matches
from megatron_eagle.curation.vectors import StoredRows, VectorStore


@dataclass
class _Side:
    """Samples of one category: where they are from, and the keys of their vectors."""

    keys: list[tuple[str, int]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    images: list[list[int]] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    pictures: list[list[Place]] = field(default_factory=list)

    def add(self, row: Row) -> None:
        for column, one in zip(
            (self.keys, self.ids, self.images, self.texts, self.pictures),
            (row.key, row.id, row.value[0], [row.value[1]], row.value[2]),
            strict=True,
        ):
            column.append(one)

    def pairs(self, stores: tuple[VectorStore, VectorStore]) -> Pairs:
        return Pairs(StoredRows(stores[0], self.images), StoredRows(stores[1], self.texts))


@dataclass(frozen=True, config=STRICT)
class Operator(SetOperator):
    """pool: names of the sources that all others are compared with, which may be benchmarks; empty: each source with all
    others of its category.

    redundant: similarity of a source, or a sample, from which it is said to add little: a choice of this project, the
    paper gives none. top: matches of a sample that are looked up. shown: samples of a source and category in the report.
    negative: cosines below 0 count as 0 (``zero``), or multiply as they are (``literal``, the formula as it stands).
    """

    needs: ClassVar[tuple[str, ...]] = ("embeddings",)
    holds: ClassVar[int] = 900  # keys, ids and the place of a picture
    on_benchmarks: ClassVar[bool] = True

    pool: tuple[str, ...] = ()
    redundant: Fraction = 0.5
    top: Positive = 3
    shown: Count = 8
    negative: Negative = "zero"

    def check(self, categories: Mapping[str, str], benchmarks: Sequence[str]) -> None:
        """ValueError if the pool is not of the plan, or is all of it."""
        there = [*categories, *(name for name in benchmarks if name not in categories)]
        for name in self.pool:
            if name not in there:
                raise ValueError(f"pool: source '{name}' does not exist; there are {', '.join(there)}")
        if self.pool and not set(categories) - set(self.pool):
            raise ValueError("pool: all sources are in it, and none is left to be compared")

    def value(self, sample: Sample) -> Any:
        """Keys of the vectors and the place of the first picture; null if a vector is missing."""
        note = sample.notes.get("embeddings", {})
        keys = note.get("images", [])[: len(sample.images)]
        if not keys or "text" not in note:
            return [[], 0, [], "", ""]
        return [keys, note["text"], places_of(sample.images[:1]), note["image_store"], note["text_store"]]

    def decide(self, rows: Iterator[Row]) -> Iterator[Verdict]:
        """Of each source and category its similarity, and of each sample its best match."""
        sides: dict[tuple[str, str], _Side] = {}  # source, category
        missing: dict[str, int] = {}
        stores: tuple[VectorStore, VectorStore] | None = None
        for row in rows:
            if row.benchmark and row.key[0] not in self.pool:
                continue
            if not row.value[0]:
                missing[row.key[0]] = missing.get(row.key[0], 0) + 1
                continue
            sides.setdefault((row.key[0], row.category), _Side()).add(row)
            stores = stores or (VectorStore(Path(row.value[3])), VectorStore(Path(row.value[4])))
        for source, many in missing.items():
            if source not in self.pool:
                detail = f"{many} samples without a picture or a vector of picture and text"
                yield Verdict((source, None), Finding("noted", "not compared", detail))
        for (source, category), own in sides.items():
            if source in self.pool:
                continue
            others = [side for (name, other), side in sides.items()
                      if other == category and name != source and (not self.pool or name in self.pool)]  # fmt: skip
            if not others:
                there = ", ".join(sorted({other for name, other in sides if name != source})) or "none"
                detail = f"of category {category} there is nothing to compare with; others have {there}"
                yield Verdict((source, None), Finding("noted", "not compared", detail))
                continue
            assert stores is not None
            yield from self._compare(source, category, own, others, stores)

    def _compare(
        self, source: str, category: str, own: _Side, others: list[_Side], stores: tuple[VectorStore, VectorStore]
    ) -> Iterator[Verdict]:
        pool = _Side(*(sum((getattr(side, name) for side in others), []) for name in _Side.__dataclass_fields__))
        matches = best_matches(own.pairs(stores), pool.pairs(stores), self.top, self.negative)
        best = matches.scores[:, 0]
        close = int((best >= self.redundant).sum())
        similarity = round(matches.similarity, 6)
        adds = "adds little" if similarity >= self.redundant else "adds something"
        detail = (
            f"category {category}: S = {similarity:.4f} over {len(best)} samples against {len(pool.keys)}, {adds} "
            f"(redundant from {self.redundant:g}); {close} samples are redundant by themselves"
        )
        scores = {"similarity": similarity, "samples": len(best), "pool": len(pool.keys), "redundant": close}
        yield Verdict((source, None), Finding("noted", "similarity", detail, scores=scores))
        nearest = np.bincount([others_of(pool, int(row), names) for row in matches.rows[:, 0]], minlength=1) if (
            names := list(dict.fromkeys(key[0] for key in pool.keys))
        ) else []
        parts = ", ".join(f"{name} {many}" for name, many in zip(names, nearest, strict=False))
        yield Verdict((source, None), Finding("noted", "best matches lie in", f"category {category}: {parts}"))
        ranked = set(np.argsort(-best, kind="stable")[: self.shown].tolist())
        for number, key in enumerate(own.keys):
            yield Verdict(key, self._match(category, matches, number, pool, number in ranked))

    def _match(self, category: str, matches: Matches, number: int, pool: _Side, shown: bool) -> Finding:
        texts, pictures = [], []
        for row, score, image, text in zip(
            *(column[number] for column in (matches.rows, matches.scores, matches.images, matches.texts)), strict=True
        ):
            texts.append(f"{score:.4f} = {image:.4f} x {text:.4f} with {pool.keys[row][0]}/{pool.ids[row]}")
            pictures += pool.pictures[row]
        scores = {
            "similarity": round(float(matches.scores[number, 0]), 6),
            "image": round(float(matches.images[number, 0]), 6),
            "text": round(float(matches.texts[number, 0]), 6),
        }
        beside = pictures if shown else None
        return Finding("noted", f"best match, {category}", "; ".join(texts), scores=scores, beside=beside)
