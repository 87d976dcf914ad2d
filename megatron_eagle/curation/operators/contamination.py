"""Samples whose images or questions stand in a benchmark: what is tested later must not be trained on.

Benchmarks are sources of the plan with ``benchmark: true``, read like any other, compared with, and never kept.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Count, Positive, Share
from megatron_eagle.curation.hashing import near_pairs
from megatron_eagle.curation.operator import Row, SetOperator, Step, Verdict
from megatron_eagle.curation.operators.embeddings import require_vectors
from megatron_eagle.curation.questions import normal
from megatron_eagle.curation.sample import Finding, Sample
from megatron_eagle.curation.similarity import near_across
from megatron_eagle.curation.vectors import VectorStore


@dataclass(frozen=True, config=STRICT)
class Operator(SetOperator):
    """image_distance: bits of 64 in which the hash of a benchmark's image may differ; a flat picture is never compared.

    embedding_similarity: cosine of the vectors of 'embeddings' from which an image is a benchmark's, whatever its hash;
        null: vectors are not compared.

    words: a question of fewer is too common to tell; others are found if they are equal but for case and signs.
    """

    needs: ClassVar[tuple[str, ...]] = ("image_hashes",)
    holds: ClassVar[int] = 100  # 32 for each image and each question, and the tables
    on_benchmarks: ClassVar[bool] = True

    image_distance: Count = 6
    words: Positive = 6
    embedding_similarity: Share | None = None

    def reads(self) -> tuple[str, ...]:
        """Notes of hashes, and of vectors where they are compared."""
        return (*self.needs, *(("embeddings",) if self.embedding_similarity is not None else ()))

    def check(self, categories: Mapping[str, str], benchmarks: Sequence[str]) -> None:
        """ValueError without a benchmark."""
        if not benchmarks:
            raise ValueError("there is nothing to compare with: no source is a benchmark")

    def check_earlier(self, earlier: Mapping[str, Step]) -> None:
        """ValueError if the vectors that are compared are not made."""
        if self.embedding_similarity is not None:
            require_vectors(self.name, earlier, "images")

    def value(self, sample: Sample) -> Any:
        """Hashes of the images, and of the questions that are long enough, with the turns of their answers."""
        hashes = sample.notes.get("image_hashes", [])[: len(sample.images)]
        asked = [(normal(one.question), one.turn) for one in sample.exchanges]
        questions = [(_digest(text), turn) for text, turn in asked if len(text.split()) >= self.words]
        note = {} if self.embedding_similarity is None else sample.notes.get("embeddings", {})
        if keys := note.get("images", [])[: len(sample.images)]:
            return [hashes, questions, keys, note["image_store"]]
        return [hashes, questions] if hashes or questions else None

    def decide(self, rows: Iterator[Row]) -> Iterator[Verdict]:
        """Images first, for these take the whole sample."""
        known: dict[str, str] = {}  # question of a benchmark -> where it stands
        of_benchmarks: dict[int, str] = {}  # hash -> where it stands
        images: dict[int, list[tuple[tuple[str, int], int]]] = defaultdict(list)  # hash -> sample, number of the image
        asked: list[tuple[tuple[str, int], str, int]] = []
        seen = _Seen()
        for row in rows:
            hashes, questions, *more = row.value
            where = f"{row.key[0]}/{row.id}"
            if more:
                seen.add(row, where, *more)
            if row.benchmark:
                of_benchmarks.update((one, where) for one in hashes if one is not None and one not in of_benchmarks)
                known.update((question, where) for question, _ in questions if question not in known)
                continue
            for number, one in enumerate(hashes, 1):
                if one is not None:
                    images[one].append((row.key, number))
            asked += [(row.key, question, turn) for question, turn in questions]
        yield from self._images(of_benchmarks, images)
        if self.embedding_similarity is not None:
            yield from seen.near(self.embedding_similarity)
        for key, question, turn in asked:
            if question in known:
                yield Verdict(key, Finding("rejected", "a question of a benchmark", f"{known[question]}", turn))

    def _images(
        self, of_benchmarks: dict[int, str], images: dict[int, list[tuple[tuple[str, int], int]]]
    ) -> Iterator[Verdict]:
        every = np.array([*of_benchmarks, *images], dtype=np.uint64)
        border = len(of_benchmarks)
        nearest: dict[int, tuple[int, int]] = {}  # hash of a sample's image -> bits apart, hash of the benchmark's
        for firsts, seconds in near_pairs(every, self.image_distance):
            for pair in zip(firsts.tolist(), seconds.tolist(), strict=True):
                low, high = min(pair), max(pair)
                if low < border <= high:
                    own, other = int(every[high]), int(every[low])
                    nearest[own] = min(nearest.get(own, (65, 0)), ((own ^ other).bit_count(), other))
        for own, (apart, other) in sorted(nearest.items()):
            for key, number in images[own]:
                detail = f"image {number} is that of {of_benchmarks[other]}"
                scores = {"image_distance": apart}
                yield Verdict(key, Finding("rejected", "an image of a benchmark", detail, scores=scores))


class _Seen:
    """Vectors of the images of benchmarks, and of all others, by the keys they are stored under."""

    def __init__(self) -> None:
        self._store = ""
        self._known: dict[int, str] = {}  # of a benchmark -> where it stands
        self._images: dict[int, list[tuple[tuple[str, int], int]]] = defaultdict(list)  # sample, number of the image

    def add(self, row: Row, where: str, keys: list[int], store: str) -> None:
        """A sample's."""
        self._store = store
        for number, key in enumerate(keys, 1):
            if row.benchmark:
                self._known.setdefault(key, where)
            else:
                self._images[key].append((row.key, number))

    def near(self, least: float) -> Iterator[Verdict]:
        """Samples with an image like one of a benchmark, each image with the nearest."""
        if not self._known or not self._images:
            return
        store = VectorStore(Path(self._store))
        known, own = list(self._known), list(self._images)
        benchmarks, images = store.read(known), store.read(own)
        nearest: dict[int, tuple[float, int]] = {}
        for firsts, seconds in near_across(images, benchmarks, least):
            cosines = np.einsum("ij,ij->i", images[firsts], benchmarks[seconds], dtype=np.float64).round(4)
            for first, second, cosine in zip(firsts.tolist(), seconds.tolist(), cosines.tolist(), strict=True):
                nearest[first] = max(nearest.get(first, (-2.0, 0)), (cosine, -second))
        for first, (cosine, second) in sorted(nearest.items()):
            for key, number in self._images[own[first]]:
                detail = f"image {number} is like that of {self._known[known[-second]]}"
                scores = {"embedding_similarity": cosine}
                yield Verdict(key, Finding("rejected", "like an image of a benchmark", detail, scores=scores))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
