"""The order of a pass over a source, computed place by place: no array of the whole is ever made.

A keyed permutation of [0, n) by a Feistel network (Luby and Rackoff 1988). Its two halves are a number below a and one
below b, a x b hardly more than n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"); what falls on n or
beyond is sent through the network again until it does not (cycle walking), which keeps it a permutation of [0, n). So
a stretch of m places costs m, whatever n is, and any process computes any stretch by itself.

This is shuffling, not secrecy: the round function is SplitMix64's finaliser (Steele, Lea and Flood 2014).
"""

import hashlib
import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint64]

ROUNDS = 12
LARGEST = 1 << 40  # below it, 32 bits of a round's hash are shared out over a half evenly to one part in 4096

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


@dataclass(frozen=True)
class ShuffledPasses:
    """An endless row: the numbers 0 ... ``size`` - 1 in an order of ``key``'s, then again in another order, and so on.

    size: from 1 to LARGEST, else ValueError. key: any bytes; other keys give other orders.
    """

    size: int
    key: bytes

    def __post_init__(self) -> None:
        if not 1 <= self.size <= LARGEST:
            raise ValueError(f"a pass over {self.size} samples cannot be shuffled, 1 to {LARGEST} can")

    def stretch(self, begin: int, end: int) -> NDArray[np.int64]:
        """int64 [end - begin]: the numbers at the places from ``begin`` to ``end`` of the row."""
        if not 0 <= begin <= end:
            raise ValueError(f"places {begin} to {end} are no stretch")
        if begin == end:
            return np.zeros(0, np.int64)
        places = np.arange(begin, end, dtype=np.uint64)
        first, count = begin // self.size, -(-end // self.size) - begin // self.size
        passes = places // np.uint64(self.size)
        numbers = places - passes * np.uint64(self.size)
        keys = self._round_keys(first, count)
        # Which pass a number is of; where all are of one, they share its keys.
        own = (passes - np.uint64(first)).astype(np.intp) if count > 1 else np.zeros(1, np.intp)
        numbers = self._network(numbers, keys, own)
        beyond = np.flatnonzero(numbers >= self.size)
        while len(beyond):
            numbers[beyond] = self._network(numbers[beyond], keys, own[beyond] if count > 1 else own)
            beyond = beyond[numbers[beyond] >= self.size]
        return numbers.astype(np.int64)

    def _round_keys(self, first: int, count: int) -> Words:
        """uint64 [ROUNDS, count]: of the passes from ``first`` on."""
        own = hashlib.shake_256(self.key).digest(8 * ROUNDS)
        passes = np.arange(first, first + count, dtype=np.uint64)
        return _mixed(np.frombuffer(own, dtype="<u8").astype(np.uint64)[:, None] + passes[None, :] * _GOLDEN)

    def _network(self, numbers: Words, keys: Words, own: NDArray[np.intp]) -> Words:
        """Once through all rounds. ``a`` is even: were both halves odd, only even permutations could come out."""
        a = 2 * math.ceil(math.sqrt(self.size) / 2)
        sizes = np.uint64(a), np.uint64(-(-self.size // a))
        left, right = np.divmod(numbers, sizes[1])
        for number in range(0, ROUNDS, 2):
            left = _shifted(left, right, keys[number][own], sizes[0])
            right = _shifted(right, left, keys[number + 1][own], sizes[1])
        return left * sizes[1] + right


def _shifted(half: Words, other: Words, key: Words, size: np.uint64) -> Words:
    """``half`` plus a hash of the other half, modulo ``size``."""
    half = half + ((_mixed(other + key) >> _HALF) * size >> _HALF)
    half -= size * (half >= size)
    return half


def _mixed(words: Words) -> Words:
    """SplitMix64's finaliser, a bijection of 64 bits."""
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))
