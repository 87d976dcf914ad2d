"""Fingerprints by which near-duplicates are found: of a picture 64 bits, of a text the set of its character 5-grams.

A picture's are the signs of the 64 lowest frequencies of its cosine transform against their median (pHash, Zauner 2010)
of the whole decoded picture: decoders that shrink while they decode change up to six bits. Flat pictures have none, for
their bits are noise.
"""

import base64
import zlib
from collections.abc import Iterator
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_eagle.curation.questions import normal

SIDE, LOW = 32, 8  # pixels of the picture that is transformed, frequencies that are kept in each direction
FLAT = 4.0  # standard deviation of brightness, of 255
GRAM = 5
MOST_EQUAL = 4  # parts of two hashes that are looked for at once
SORTING = 4.0  # cost of a hash in a sort, in comparisons
PRIME = np.uint64((1 << 31) - 1)

_ANGLES = np.pi / SIDE * np.outer(np.arange(LOW), np.arange(SIDE) + 0.5)
_COSINES = np.cos(_ANGLES)


def picture_hash(image: Image.Image) -> int | None:
    """64 bits of a picture; None if it is flat."""
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    if grey.std() < FLAT:
        return None
    frequencies = (_COSINES @ grey @ _COSINES.T).ravel()
    bits = frequencies > np.median(frequencies[1:])
    return int("".join("1" if bit else "0" for bit in bits), 2)


def near_pairs(hashes: NDArray[np.uint64], distance: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Indices of all pairs of hashes that differ in at most ``distance`` bits, each once or more; exact.

    Of distance + k parts of two such hashes at least k are equal (pigeonhole); only those are compared, for each choice
    of k parts. k is what is cheapest for so many hashes.
    """
    equal = min(range(1, MOST_EQUAL + 1), key=lambda k: _cost(len(hashes), distance, k))
    cut = list(parts(hashes, distance + equal))
    wide = np.uint64(-(-64 // len(cut)))
    for chosen in combinations(cut, equal):
        keys = chosen[0]
        for part in chosen[1:]:
            keys = keys << wide | part
        for first, second in equal_pairs(keys):
            near = np.bitwise_count(hashes[first] ^ hashes[second]) <= distance
            if near.any():
                yield first[near], second[near]


def _cost(many: int, distance: int, equal: int) -> float:
    """Of a search with so many equal parts: each choice sorts all, and compares those that chance makes equal."""
    choices = comb(distance + equal, equal)
    return choices * (SORTING * many + many**2 / 2 ** (1 + 64 * equal / (distance + equal)))


def parts(hashes: NDArray[np.uint64], many: int) -> Iterator[NDArray[np.uint64]]:
    """So many stretches of the 64 bits of each hash, as even as can be."""
    edges = [round(64 * number / many) for number in range(many + 1)]
    for low, high in zip(edges, edges[1:], strict=False):
        yield (hashes >> np.uint64(min(low, 63))) & np.uint64((1 << (high - low)) - 1)


def equal_pairs(
    keys: NDArray[np.uint64], kinds: NDArray[np.int64] | None = None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Indices of all pairs with equal keys, each pair once, many at a time; memory is that of a few such arrays.

    kinds: of runs of equal keys only those are looked at in which not all are of one kind.
    """
    order, ranked = _ordered(keys)
    starts = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1]))) if len(keys) else np.empty(0, int)
    sizes = np.diff(starts, append=len(keys))
    wanted = sizes > 1
    if kinds is not None and len(keys):
        own = kinds[order]
        wanted &= np.minimum.reduceat(own, starts) != np.maximum.reduceat(own, starts)
    ends = np.repeat(starts + sizes, sizes)
    left = np.flatnonzero(np.repeat(wanted, sizes))
    for step in range(1, int(sizes.max(initial=0))):
        left = left[left + step < ends[left]]
        if not len(left):
            return
        yield order[left], order[left + step]


def _ordered(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """A stable order and the keys in it; small keys are sorted with their places in one number, which is faster."""
    bits = max(1, len(keys) - 1).bit_length()
    if len(keys) and int(keys.max()).bit_length() + bits <= 64:
        both = np.sort(keys << np.uint64(bits) | np.arange(len(keys), dtype=np.uint64))
        return (both & np.uint64((1 << bits) - 1)).astype(np.int64), both >> np.uint64(bits)
    order = np.argsort(keys, kind="stable")
    return order, keys[order]


def grams(text: str) -> NDArray[np.uint32]:
    """Sorted hashes of all runs of five characters of a text, lower case and words only; a shorter one is one run."""
    plain = normal(text)
    runs = {plain[start : start + GRAM] for start in range(max(1, len(plain) - GRAM + 1))} if plain else set()
    return np.array(sorted(zlib.crc32(run.encode()) for run in runs), dtype=np.uint32)


def pack(values: NDArray[np.uint32]) -> str:
    """As text that JSON holds."""
    return base64.b64encode(values.astype("<u4").tobytes()).decode()


def unpack(text: str) -> NDArray[np.uint32]:
    """What ``pack`` made a text of."""
    return np.frombuffer(base64.b64decode(text), dtype="<u4")


def jaccard(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> float:
    """Common grams of all grams; 1 of two empty sets."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    either = len(first) + len(second) - common
    return common / either if either else 1.0


def bands(values: NDArray[np.uint32], many: int, rows: int) -> list[int]:
    """MinHash signature of a set, folded into ``many`` numbers of ``rows`` values each (Broder 1997).

    Two sets of similarity J share at least one with probability 1 - (1 - J ** rows) ** many.
    """
    if not len(values):
        return [0] * many
    random = np.random.default_rng(20_260_101)  # the same functions everywhere
    factors, shifts = (random.integers(1, int(PRIME), many * rows, dtype=np.uint64) for _ in range(2))
    reduced = values.astype(np.uint64) % PRIME
    least = ((factors[:, None] * reduced + shifts[:, None]) % PRIME).min(axis=1).reshape(many, rows)
    return [zlib.crc32(band.astype("<u8").tobytes()) for band in least]
