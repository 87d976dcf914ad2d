"""Near-duplicates across all sources: of each cluster the first sample stays, the others are left.

Two samples are near-duplicates if all their images are, one by one, and their texts are. Clusters are closed under
that: a sample's near-duplicates are in its cluster with theirs. A sample with a flat picture, which has no hash, has no
near-duplicate.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import combinations, product
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Count, Share
from megatron_eagle.curation.hashing import bands, equal_pairs, grams, jaccard, near_pairs, pack, parts, unpack
from megatron_eagle.curation.operator import Row, SetOperator, Verdict
from megatron_eagle.curation.sample import Finding, Sample, plain_text

BANDS, ROWS = 20, 3  # of 1 000 pairs with J = 0.6 8 are missed, of those with 0.8 less than one in a million
Fingerprint = tuple[tuple[int, ...], NDArray[np.uint32]]


@dataclass(frozen=True, config=STRICT)
class Operator(SetOperator):
    """image_distance: bits of 64 in which hashes of near-duplicates may differ; null: images are not compared.

    text_similarity: Jaccard similarity of character 5-grams from which texts are near-duplicates; null: not compared.
    With images only, a picture is kept once, whatever is asked about it.
    """

    needs: ClassVar[tuple[str, ...]] = ("image_hashes",)
    holds: ClassVar[int] = 2500  # at texts of 300 characters: 700, and 6 for each (measured, 2026-11-26)

    image_distance: Count | None = 6
    text_similarity: Share | None = 0.8

    def __post_init__(self) -> None:
        if self.image_distance is None and self.text_similarity is None:
            raise ValueError("image_distance and text_similarity are both null: nothing is compared")

    def value(self, sample: Sample) -> Any:
        """Hashes and grams; samples without anything that is compared take no part."""
        hashes = [] if self.image_distance is None else sample.notes.get("image_hashes", [])[: len(sample.images)]
        if None in hashes:
            return None
        if self.text_similarity is None:
            return [hashes, ""] if hashes else None
        text = "\n".join(plain_text(turn.text) for turn in sample.conversation.turns if turn.role != "system")
        return [hashes, pack(grams(text))]

    def decide(self, rows: Iterator[Row]) -> Iterator[Verdict]:
        """Of each cluster a note on the one that stays, and the others."""
        keys: list[tuple[tuple[str, int], str]] = []
        prints: list[Fingerprint] = []
        for row in rows:
            keys.append((row.key, row.id))
            prints.append((tuple(row.value[0]), unpack(row.value[1])))
        roots = _Clusters(len(prints))
        for first, second in self._candidates(prints):
            if roots.of(first) != roots.of(second) and self._alike(prints[first], prints[second]):
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
                scores = self._scores(prints[first], prints[one])
                yield Verdict(keys[one][0], Finding("left", "a near-duplicate", detail, scores=scores))

    def _candidates(self, prints: list[Fingerprint]) -> Iterable[tuple[int, int]]:
        """Pairs that may be near-duplicates."""
        if self.text_similarity is None and self.image_distance is not None:
            yield from _near_images(prints, self.image_distance)
            return
        firsts: dict[tuple[bytes, ...], int] = {}
        texts: dict[bytes, int] = {}
        groups: dict[int, list[int]] = defaultdict(list)  # images -> samples
        kinds: list[int] = []  # which text
        for number, (hashes, text) in enumerate(prints):
            digest = blake2b(text.tobytes(), digest_size=16).digest()
            kinds.append(texts.setdefault(digest, len(texts)))
            same = firsts.setdefault((digest, repr(hashes).encode()), number)
            if same != number:  # a sample that equals an earlier one is compared with that alone
                yield same, number
            else:
                groups[len(hashes)].append(number)
        del firsts, texts
        for images, group in groups.items():
            numbers = np.array(group)
            own = np.array(kinds)[numbers]
            hashed = np.array([prints[one][0][0] for one in group], dtype=np.uint64) if images else None
            for first, second in self._in_bands(_all_bands(prints, group, own), own, hashed):
                yield from zip(numbers[first].tolist(), numbers[second].tolist(), strict=True)

    def _in_bands(
        self, table: NDArray[np.uint32], texts: NDArray[np.int64], hashes: NDArray[np.uint64] | None
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Pairs that share a band and whose first images, if they have any, are near.

        Samples of one text share all bands: pairs of them come out of the first only.
        """
        for place in range(BANDS):
            band = table[:, place].astype(np.uint64)
            kinds = texts if place else None
            if hashes is None or self.image_distance is None:
                yield from equal_pairs(band, kinds)
                continue
            _, ranks = np.unique(band, return_inverse=True)
            for part in parts(hashes, self.image_distance):
                _, key = np.unique(part, return_inverse=True)
                both = ranks.astype(np.uint64) * np.uint64(len(key)) + key.astype(np.uint64)
                for first, second in equal_pairs(both, kinds):
                    near = np.bitwise_count(hashes[first] ^ hashes[second]) <= self.image_distance
                    yield first[near], second[near]

    def _alike(self, first: Fingerprint, second: Fingerprint) -> bool:
        most = self.image_distance
        if most is not None and (len(first[0]) != len(second[0]) or max(_apart(first, second), default=0) > most):
            return False
        return self.text_similarity is None or jaccard(first[1], second[1]) >= self.text_similarity

    def _scores(self, first: Fingerprint, second: Fingerprint) -> dict[str, float]:
        scores: dict[str, float] = {}
        if apart := _apart(first, second):
            scores["image_distance"] = max(apart)
        if self.text_similarity is not None:
            scores["text_similarity"] = round(jaccard(first[1], second[1]), 4)
        return scores


def _apart(first: Fingerprint, second: Fingerprint) -> list[int]:
    """Bits in which the images differ, one by one."""
    return [(one ^ other).bit_count() for one, other in zip(first[0], second[0], strict=False)]


def _all_bands(prints: list[Fingerprint], group: list[int], texts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Bands of the samples of a group, made once of each text."""
    _, firsts, which = np.unique(texts, return_index=True, return_inverse=True)
    table = np.array([bands(prints[group[one]][1], BANDS, ROWS) for one in firsts], dtype=np.uint32)
    return table[which]


def _near_images(prints: list[Fingerprint], distance: int) -> Iterator[tuple[int, int]]:
    """Pairs whose first images are near; samples whose images are equal are compared with the first of them alone."""
    firsts: dict[tuple[int, ...], int] = {}
    by_hash: dict[int, list[int]] = defaultdict(list)
    for number, (hashes, _) in enumerate(prints):
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
