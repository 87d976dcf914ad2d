"""Fingerprints by which near-duplicates are found: of a picture 64 bits, of a text the set of its character 5-grams.

A picture's are the signs of the 64 lowest frequencies of its cosine transform against their median (pHash, Zauner 2010)
of the whole decoded picture: decoders that shrink while they decode change up to six bits. Flat pictures have none, for
their bits are noise.
"""

import base64
import math
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
    for part in parts(distance):
        keys = (hashes >> np.uint64(part.start)) & np.uint64((1 << len(part)) - 1)
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order], prepend=np.uint64(1 << 63)))
        for start, end in zip(edges, [*edges[1:], len(order)], strict=True):
            group = order[start:end]
            for row in range(0, len(group) - 1):
                apart = np.bitwise_count(hashes[group[row]] ^ hashes[group[row + 1 :]])
                near = np.flatnonzero(apart <= distance)
                if len(near):
                    yield np.full(len(near), group[row]), group[row + 1 + near]


def parts(distance: int) -> list[range]:
    """distance + 1 stretches of the 64 bits, as even as can be."""
    edges = [round(64 * number / (distance + 1)) for number in range(distance + 2)]
    return [range(low, high) for low, high in zip(edges, edges[1:], strict=False)]


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


def missed(similarity: float, many: int, rows: int) -> float:
    """Share of pairs of a similarity that ``bands`` does not bring together."""
    return math.pow(1 - similarity**rows, many)
