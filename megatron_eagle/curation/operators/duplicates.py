"""Near-duplicates across all sources: of each cluster the first sample stays, the others are left.

Two samples are near-duplicates if all their images are, one by one, by hash or by vector, and their texts are. Clusters
are closed under that: a sample's near-duplicates are in its cluster with theirs. A sample with a flat picture, which
has no hash, has no near-duplicate.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from hashlib import blake2b
from itertools import combinations, product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Count, Share
from megatron_eagle.curation.hashing import bands, equal_pairs, grams, jaccard, near_pairs, pack, parts, unpack
from megatron_eagle.curation.operator import Row, SetOperator, Step, Verdict
from megatron_eagle.curation.operators.embeddings import require_vectors
from megatron_eagle.curation.sample import Finding, Sample, plain_text
from megatron_eagle.curation.similarity import near_vectors
from megatron_eagle.curation.vectors import VectorStore

BANDS, ROWS = 20, 3  # of 1 000 pairs with J = 0.6 8 are missed, of those with 0.8 less than one in a million


@plain_dataclass(frozen=True)
class Fingerprint:
    """hashes, text: of the images and the text, empty if they are not compared. pictures: rows in ``_Vectors``."""

    hashes: tuple[int, ...]
    text: NDArray[np.uint32]
    pictures: tuple[int, ...] = ()

    @property
    def images(self) -> int:
        """How many images are compared."""
        return max(len(self.hashes), len(self.pictures))


class _Vectors:
    """The vectors of all different pictures. near: pairs of rows, the lower first. alike: number of the set of each."""

    def __init__(self, store: VectorStore, keys: list[int], least: float) -> None:
        self.rows = store.read(keys)
        self.near: set[tuple[int, int]] = set()
        sets = _Clusters(len(keys))
        for first, second in near_vectors(self.rows, least):
            for pair in zip(first.tolist(), second.tolist(), strict=True):
                self.near.add(pair)
                sets.join(*pair)
        self.alike = np.array([sets.of(number) for number in range(len(keys))], dtype=np.uint64)

    def cosine(self, first: int, second: int) -> float:
        """Of two rows."""
        return float(self.rows[first].astype(np.float64) @ self.rows[second].astype(np.float64))


@dataclass(frozen=True, config=STRICT)
class Operator(SetOperator):
    """image_distance: bits of 64 in which hashes of near-duplicates may differ; null: hashes are not compared.

    embedding_similarity: cosine of the vectors of 'embeddings' from which images are near-duplicates whatever their
        hashes, 0.75 and more for SSCD; every pair of different pictures is compared. null: vectors are not compared.
    text_similarity: Jaccard similarity of character 5-grams from which texts are near-duplicates; null: not compared.
    With images only, a picture is kept once, whatever is asked about it.
    """

    needs: ClassVar[tuple[str, ...]] = ("image_hashes",)
    holds: ClassVar[int] = 2500  # at texts of 300 characters: 700, and 6 for each (measured, 2026-11-26)

    image_distance: Count | None = 6
    text_similarity: Share | None = 0.8
    embedding_similarity: Share | None = None

    def __post_init__(self) -> None:
        if self.image_distance is self.text_similarity is self.embedding_similarity is None:
            raise ValueError(
                "image_distance, text_similarity and embedding_similarity are all null: nothing is compared"
            )

    def reads(self) -> tuple[str, ...]:
        """Notes of hashes, of vectors or of both."""
        hashes = ("image_hashes",) if self.image_distance is not None or self.embedding_similarity is None else ()
        return (*hashes, *(("embeddings",) if self.embedding_similarity is not None else ()))

    def check_earlier(self, earlier: Mapping[str, Step]) -> None:
        """ValueError if the vectors that are compared are not made."""
        if self.embedding_similarity is not None:
            require_vectors(self.name, earlier, "images")

    def value(self, sample: Sample) -> Any:
        """Hashes and grams; samples without anything that is compared take no part."""
        hashes = [] if self.image_distance is None else sample.notes.get("image_hashes", [])[: len(sample.images)]
        note = {} if self.embedding_similarity is None else sample.notes.get("embeddings", {})
        keys = note.get("images", [])[: len(sample.images)]
        if None in hashes:
            return None
        if self.text_similarity is None and not hashes and not keys:
            return None
        text = ""
        if self.text_similarity is not None:
            text = pack(
                grams("\n".join(plain_text(turn.text) for turn in sample.conversation.turns if turn.role != "system"))
            )
        return [hashes, text, keys, note["image_store"]] if keys else [hashes, text]

    def decide(self, rows: Iterator[Row]) -> Iterator[Verdict]:
        """Of each cluster a note on the one that stays, and the others."""
        keys: list[tuple[tuple[str, int], str]] = []
        prints: list[Fingerprint] = []
        pictures: dict[int, int] = {}  # key of a vector -> its row
        store = ""
        for row in rows:
            keys.append((row.key, row.id))
            hashes, text, *more = row.value
            store = more[1] if more else store
            numbers = tuple(pictures.setdefault(key, len(pictures)) for key in (more[0] if more else ()))
            compared = () if self.image_distance is None else tuple(hashes)
            prints.append(Fingerprint(compared, unpack(text), numbers))
        vectors = None
        if pictures and self.embedding_similarity is not None:
            vectors = _Vectors(VectorStore(Path(store)), list(pictures), self.embedding_similarity)
        roots = _Clusters(len(prints))
        for first, second in self._candidates(prints, vectors):
            if roots.of(first) != roots.of(second) and self._alike(prints[first], prints[second], vectors):
                roots.join(first, second)
        members: dict[int, list[int]] = defaultdict(list)
        for number in range(len(prints)):
            members[roots.of(number)].append(number)
        for first, cluster in members.items():
            if len(cluster) == 1:
                continue
            names = ", ".join(f"{keys[one][0][0]}/{keys[one][1]}" for one in cluster[1:])
            detail = f"{len(cluster) - 1}: {names}"
            yield Verdict(keys[first][0], Finding("noted", "stays for its near-duplicates", detail))
            for one in cluster[1:]:
                detail = f"of {keys[first][0][0]}/{keys[first][1]}"
                scores = self._scores(prints[first], prints[one], vectors)
                yield Verdict(keys[one][0], Finding("left", "a near-duplicate", detail, scores=scores))

    def _candidates(self, prints: list[Fingerprint], vectors: _Vectors | None) -> Iterable[tuple[int, int]]:
        """Pairs that may be near-duplicates."""
        if self.text_similarity is None:
            if self.image_distance is not None:
                yield from _near_images(prints, self.image_distance)
            if vectors is not None:
                shown = [number for number, one in enumerate(prints) if one.pictures]
                for first, second in equal_pairs(_sets(prints, shown, vectors)):
                    yield from ((shown[one], shown[two]) for one, two in zip(first, second, strict=True))
            return
        firsts: dict[tuple[bytes, ...], int] = {}
        texts: dict[bytes, int] = {}
        groups: dict[int, list[int]] = defaultdict(list)  # images -> samples
        kinds: list[int] = []  # which text
        for number, one in enumerate(prints):
            digest = blake2b(one.text.tobytes(), digest_size=16).digest()
            kinds.append(texts.setdefault(digest, len(texts)))
            same = firsts.setdefault((digest, repr((one.hashes, one.pictures)).encode()), number)
            if same != number:  # a sample that equals an earlier one is compared with that alone
                yield same, number
            else:
                groups[one.images].append(number)
        del firsts, texts
        for images, group in groups.items():
            numbers = np.array(group)
            own = np.array(kinds)[numbers]
            hashed = sets = None
            if images and self.image_distance is not None:
                hashed = np.array([prints[one].hashes[0] for one in group], dtype=np.uint64)
            if images and vectors is not None:
                sets = _sets(prints, group, vectors)
            for first, second in self._in_bands(_all_bands(prints, group, own), own, hashed, sets):
                yield from zip(numbers[first].tolist(), numbers[second].tolist(), strict=True)

    def _in_bands(
        self,
        table: NDArray[np.uint32],
        texts: NDArray[np.int64],
        hashes: NDArray[np.uint64] | None,
        sets: NDArray[np.uint64] | None,
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Pairs that share a band and whose first images, if they have any, are near by hash or may be by vector.

        Samples of one text share all bands: pairs of them come out of the first only.
        """
        for place in range(BANDS):
            band = table[:, place].astype(np.uint64)
            kinds = texts if place else None
            if hashes is None and sets is None:
                yield from equal_pairs(band, kinds)
                continue
            _, ranks = np.unique(band, return_inverse=True)
            if sets is not None:
                yield from equal_pairs(ranks.astype(np.uint64) * np.uint64(len(sets) + 1) + _ranked(sets), kinds)
            if hashes is None or self.image_distance is None:
                continue
            for part in parts(hashes, self.image_distance + 1):
                _, key = np.unique(part, return_inverse=True)
                both = ranks.astype(np.uint64) * np.uint64(len(key)) + key.astype(np.uint64)
                for first, second in equal_pairs(both, kinds):
                    near = np.bitwise_count(hashes[first] ^ hashes[second]) <= self.image_distance
                    yield first[near], second[near]

    def _alike(self, first: Fingerprint, second: Fingerprint, vectors: _Vectors | None = None) -> bool:
        if first.images != second.images or not all(
            self._near(first, second, number, vectors) for number in range(first.images)
        ):
            return False
        return self.text_similarity is None or jaccard(first.text, second.text) >= self.text_similarity

    def _near(self, first: Fingerprint, second: Fingerprint, number: int, vectors: _Vectors | None) -> bool:
        """Whether the images of this number are."""
        if self.image_distance is not None and first.hashes and second.hashes:
            apart = (first.hashes[number] ^ second.hashes[number]).bit_count()
            if apart <= self.image_distance:
                return True
        if vectors is None or not first.pictures or not second.pictures:
            return False
        low, high = sorted((first.pictures[number], second.pictures[number]))
        return low == high or (low, high) in vectors.near

    def _scores(self, first: Fingerprint, second: Fingerprint, vectors: _Vectors | None) -> dict[str, float]:
        scores: dict[str, float] = {}
        if apart := _apart(first, second):
            scores["image_distance"] = max(apart)
        if vectors is not None and first.pictures and second.pictures:
            both = zip(first.pictures, second.pictures, strict=False)
            scores["embedding_similarity"] = round(min(vectors.cosine(*pair) for pair in both), 4)
        if self.text_similarity is not None:
            scores["text_similarity"] = round(jaccard(first.text, second.text), 4)
        return scores


def _sets(prints: list[Fingerprint], group: list[int], vectors: _Vectors) -> NDArray[np.uint64]:
    """Number of the set that the first image of each is in; near images are in one set."""
    return vectors.alike[[prints[one].pictures[0] for one in group]]


def _ranked(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return np.unique(numbers, return_inverse=True)[1].astype(np.uint64)


def _apart(first: Fingerprint, second: Fingerprint) -> list[int]:
    """Bits in which the images differ, one by one."""
    return [(one ^ other).bit_count() for one, other in zip(first.hashes, second.hashes, strict=False)]


def _all_bands(prints: list[Fingerprint], group: list[int], texts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Bands of the samples of a group, made once of each text."""
    _, firsts, which = np.unique(texts, return_index=True, return_inverse=True)
    table = np.array([bands(prints[group[one]].text, BANDS, ROWS) for one in firsts], dtype=np.uint32)
    return table[which]


def _near_images(prints: list[Fingerprint], distance: int) -> Iterator[tuple[int, int]]:
    """Pairs whose first images are near; samples whose images are equal are compared with the first of them alone."""
    firsts: dict[tuple[int, ...], int] = {}
    by_hash: dict[int, list[int]] = defaultdict(list)
    for number, hashes in ((number, one.hashes) for number, one in enumerate(prints) if one.hashes):
        same = firsts.setdefault(hashes, number)
        if same != number:
            yield same, number
        else:
            by_hash[hashes[0]].append(number)
    for group in by_hash.values():
        yield from combinations(group, 2)
    known = list(by_hash)
    for first, second in near_pairs(np.array(known, dtype=np.uint64), distance):
        for one, other in zip(first, second, strict=True):
            yield from product(by_hash[known[one]], by_hash[known[other]])


class _Clusters:
    """Sets that grow together; each goes by its first member."""

    def __init__(self, many: int) -> None:
        self._above = list(range(many))

    def of(self, number: int) -> int:
        """The first member of the set."""
        while self._above[number] != number:
            self._above[number] = self._above[self._above[number]]
            number = self._above[number]
        return number

    def join(self, first: int, second: int) -> None:
        """Make two sets one."""
        low, high = sorted((self.of(first), self.of(second)))
        self._above[high] = low
