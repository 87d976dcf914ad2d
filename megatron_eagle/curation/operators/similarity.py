"""What a source has in common with others of its category: Eq. 1 of Eagle 2, with the best matches side by side.

High is redundant. Samples without a picture or without a vector of their text take no part, and are counted. Nothing is
rejected: it is for people to say whether a source is worth its steps (``curate admit`` asks for one source).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Count, Fraction, Positive
from megatron_eagle.curation.operator import Row, SetOperator, Step, Verdict
from megatron_eagle.curation.operators.embeddings import require_vectors, text_of
from megatron_eagle.curation.sample import Finding, Sample, places_of
from megatron_eagle.curation.similarity import Matches, Negative, Pairs, best_matches
from megatron_eagle.curation.vectors import StoredRows, VectorStore

MOST_WORDS = 160  # characters of a sample's text that stand beside its match


@plain_dataclass(frozen=True)
class _Stores:
    images: VectorStore
    texts: VectorStore

    def pairs(self, rows: Sequence[Row]) -> Pairs:
        """The vectors of these samples, read where they are compared."""
        images = StoredRows(self.images, [row.value[0] for row in rows])
        return Pairs(images, StoredRows(self.texts, [[row.value[1]] for row in rows]))


@dataclass(frozen=True, config=STRICT)
class Operator(SetOperator):
    """pool: names of the sources that all others are compared with, which may be benchmarks; empty: each source with
    all others of its category.

    redundant: similarity of a source, or a sample, from which it is said to add little: a choice of this project, the
    paper gives none. top: matches of a sample that are looked up. shown: samples of a source in the report.
    negative: cosines below 0 count as 0 (``zero``), or multiply as they are (``literal``, the formula as it stands).
    """

    needs: ClassVar[tuple[str, ...]] = ("embeddings",)
    holds: ClassVar[int] = 2000  # keys, ids, the place of a picture and the beginning of the text (measured)
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

    def check_earlier(self, earlier: Mapping[str, Step]) -> None:
        """ValueError if the vectors that are compared are not made."""
        require_vectors(self.name, earlier, "images", "texts")

    def value(self, sample: Sample) -> Any:
        """Keys of the vectors, the first picture and the beginning of the text; no keys if a vector is missing."""
        note = sample.notes.get("embeddings", {})
        keys = note.get("images", [])[: len(sample.images)]
        if not keys or "text" not in note:
            return [[]]
        stores = [note["image_store"], note["text_store"]]
        return [keys, note["text"], places_of(sample.images[:1]), text_of(sample)[:MOST_WORDS], stores]

    def decide(self, rows: Iterator[Row]) -> Iterator[Verdict]:
        """Of each source its similarity, and of each sample its best match."""
        sides: dict[str, list[Row]] = {}
        categories: dict[str, str] = {}
        missing: Counter[str] = Counter()
        stores: _Stores | None = None
        for row in rows:
            source = row.key[0]
            if row.benchmark and source not in self.pool:
                continue
            categories[source] = row.category
            if not row.value[0]:
                missing[source] += 1
                continue
            if stores is None:
                stores = _Stores(*(VectorStore(Path(place)) for place in row.value[4]))
            sides.setdefault(source, []).append(row)
        for source, many in missing.items():
            detail = f"{many} samples without vectors of a picture and a text"
            yield Verdict((source, None), Finding("noted", "not compared", detail))
        for source in sides:
            if source not in self.pool:
                assert stores is not None
                yield from self._source(source, sides, categories, stores)

    def _source(
        self, source: str, sides: Mapping[str, list[Row]], categories: Mapping[str, str], stores: _Stores
    ) -> Iterator[Verdict]:
        category = categories[source]
        others = [name for name in sides if name != source and (name in self.pool or not self.pool)]
        same = [name for name in others if categories[name] == category]
        if not same:
            there = ", ".join(dict.fromkeys(categories[name] for name in others)) or "none"
            detail = f"there is nothing of category {category} to compare with; of the others there is {there}"
            yield Verdict((source, None), Finding("noted", "not compared", detail))
            return
        own, pool = sides[source], list(chain.from_iterable(sides[name] for name in same))
        matches = best_matches(stores.pairs(own), stores.pairs(pool), self.top, self.negative)
        yield Verdict((source, None), self._whole(category, matches, pool))
        best = matches.scores[:, 0]
        ranked = set(np.argsort(-best, kind="stable")[: self.shown].tolist())
        for number, row in enumerate(own):
            yield Verdict(row.key, self._match(matches, number, pool, number in ranked))

    def _whole(self, category: str, matches: Matches, pool: Sequence[Row]) -> Finding:
        best, similarity = matches.scores[:, 0], round(matches.similarity, 6)
        close = int((best >= self.redundant).sum())
        lie = Counter(pool[row].key[0] for row in matches.rows[:, 0].tolist())
        adds = "adds little" if similarity >= self.redundant else "adds something"
        detail = (
            f"S = {similarity:.4f} in category {category}: {len(best)} samples against {len(pool)}; it "
            f"{adds} (redundant from {self.redundant:g}); {close} samples are redundant by themselves; best matches "
            f"lie in {', '.join(f'{name} {many}' for name, many in lie.most_common())}"
        )
        scores = {"similarity": similarity, "samples": len(best), "pool": len(pool), "redundant": close}
        return Finding("noted", "similarity", detail, scores=scores)

    def _match(self, matches: Matches, number: int, pool: Sequence[Row], shown: bool) -> Finding:
        lines, pictures = [], []
        for rank, row in enumerate(matches.rows[number].tolist()):
            score, image, text = (
                float(column[number, rank]) for column in (matches.scores, matches.images, matches.texts)
            )
            other = pool[row]
            words = f": {' '.join(other.value[3].split())}" if shown else ""
            lines.append(f"{score:.4f} = {image:.4f} x {text:.4f} with {other.key[0]}/{other.id}{words}")
            pictures += other.value[2]
        names = ("similarity", "image", "text")
        columns = (matches.scores, matches.images, matches.texts)
        scores = {name: round(float(one[number, 0]), 6) for name, one in zip(names, columns, strict=True)}
        detail = "\n".join(lines) if shown else "; ".join(lines)
        return Finding("noted", "best match", detail, scores=scores, beside=pictures if shown else None)
