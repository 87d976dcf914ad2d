"""Fingerprints by which near-duplicates are found: of a picture 64 bits, of a text the set of its character 5-grams.

A picture's are the signs of the 64 lowest frequencies of its cosine transform against their median (pHash, Zauner 2010)
of the whole decoded picture: decoders that shrink while they decode change up to six bits. Flat pictures have none, for
their bits are noise.
"""

import base64
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_eagle.curation.questions import normal

SIDE, LOW = 32, 8  # pixels of the picture that is transformed, frequencies that are kept in each direction
FLAT = 4.0  # standard deviation of brightness, of 255
GRAM = 5
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

    Of distance + 1 parts of two such hashes at least one is equal (pigeonhole); only those are compared.
    """
    for keys in parts(hashes, distance):
        for first, second in equal_pairs(keys):
            near = np.bitwise_count(hashes[first] ^ hashes[second]) <= distance
            if near.any():
                yield first[near], second[near]


def parts(hashes: NDArray[np.uint64], distance: int) -> Iterator[NDArray[np.uint64]]:
    """distance + 1 stretches of the 64 bits of each hash, as even as can be; hashes within it are equal in one."""
    edges = [round(64 * number / (distance + 1)) for number in range(distance + 2)]
    for low, high in zip(edges, edges[1:], strict=False):
        yield (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)


def equal_pairs(
    keys: NDArray[np.uint64], kinds: NDArray[np.int64] | None = None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Indices of all pairs with equal keys, each pair once, many at a time; memory is that of a few such arrays.

    kinds: of runs of equal keys only those are looked at in which not all are of one kind.
    """
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
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
