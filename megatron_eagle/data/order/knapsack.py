"""Which samples share a pack: a pure function of their lengths, fast enough for a million of them (a few seconds).

``balanced`` is Eagle 2's balance-aware greedy knapsack (arXiv 2501.14818;
NVlabs/Eagle, ``balanced_greedy_knapsack`` in Megatron-LM's multimodal example is the same idea): more packs than
strictly needed, each sample into the emptiest, so that every pack becomes a similar mix of long and short samples.
``best_fit`` is best-fit decreasing: fewest packs, but long samples sit with long ones. Eagle 2 measured that balance
is worth more than the last percent of fill.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Sizes: TypeAlias = Sequence[int] | NDArray[np.integer]

PACKS_LOOKED_AT = 16  # before a sample with many tiles opens a new pack
WORD = 512


@dataclass
class PackPlan:
    """Indices into the lengths that were given: the packs, and what fits into no pack at all."""

    packs: list[list[int]]
    too_long: list[int]


@dataclass(frozen=True)
class _PackLimits:
    """The sizes of the samples and what one pack can hold: tokens always, tiles if there is a bound on them."""

    lengths: list[int]
    length: int
    tiles: list[int]
    max_tiles: int | None

    def split(self) -> tuple[list[int], list[int]]:
        """(samples that fit into an empty pack, longest first; samples that do not)."""
        sizes = np.array(self.lengths, dtype=np.int64)
        fits = sizes <= self.length
        if self.max_tiles is not None:
            fits &= np.array(self.tiles, dtype=np.int64) <= self.max_tiles
        order = np.argsort(-sizes, kind="stable")
        return order[fits[order]].tolist(), np.flatnonzero(~fits).tolist()

    def fewest(self, samples: list[int]) -> int:
        """Packs that these samples need at least."""
        packs = math.ceil(sum(self.lengths[i] for i in samples) / self.length)
        if self.max_tiles is None:
            return packs
        return max(packs, math.ceil(sum(self.tiles[i] for i in samples) / self.max_tiles))


def _limits(lengths: Sizes, length: int, tiles: Sizes | None, max_tiles: int | None) -> _PackLimits:
    if max_tiles is not None and tiles is None:
        raise ValueError(f"max_tiles={max_tiles} needs the tiles of each sample")
    if tiles is not None and len(tiles) != len(lengths):
        raise ValueError(f"{len(lengths)} lengths but {len(tiles)} tile counts")
    own = np.asarray(lengths, dtype=np.int64)
    if len(own) and own.min() < 1:
        raise ValueError(f"a sample of {own.min()} tokens cannot be packed")
    counts = np.zeros(len(own), dtype=np.int64) if tiles is None else np.asarray(tiles, dtype=np.int64)
    return _PackLimits(own.tolist(), length, counts.tolist(), max_tiles)


def pack_balanced(
    lengths: Sizes,
    length: int,
    *,
    delta: int,
    tiles: Sizes | None = None,
    max_tiles: int | None = None,
) -> PackPlan:
    """Longest first, each sample into the emptiest of the packs that are needed + delta, or a new one if it is too big.

    lengths: tokens of each sample; length: tokens of a pack; delta: packs more than the samples need (Eagle: 20 on
    thousands of samples). tiles, max_tiles: optional second bound, tiles of each sample and of a pack; emptiest is then
    the pack whose fuller bound is least full.
    """
    room = _limits(lengths, length, tiles, max_tiles)
    order, too_long = room.split()
    packs: list[list[int]] = [[] for _ in range(room.fewest(order) + delta)]
    if max_tiles is None:
        _fill_by_tokens(room, order, packs)
    else:
        _fill_by_tokens_and_tiles(room, order, packs, max_tiles)
    return PackPlan([pack for pack in packs if pack], too_long)


def _fill_by_tokens(room: _PackLimits, order: list[int], packs: list[list[int]]) -> None:
    emptiest = [(0, number) for number in range(len(packs))]
    for i in order:
        fill, number = emptiest[0]
        if fill + room.lengths[i] <= room.length:
            heapq.heapreplace(emptiest, (fill + room.lengths[i], number))
        else:
            number = len(packs)
            packs.append([])
            heapq.heappush(emptiest, (room.lengths[i], number))
        packs[number].append(i)


def _fill_by_tokens_and_tiles(room: _PackLimits, order: list[int], packs: list[list[int]], max_tiles: int) -> None:
    """Fullness in units of 1 / (length x max_tiles), so that all arithmetic is exact."""
    order = sorted(order, key=lambda i: -max(room.lengths[i] * max_tiles, room.tiles[i] * room.length))
    tokens, tiles = [0] * len(packs), [0] * len(packs)
    emptiest = [(0, number) for number in range(len(packs))]
    for i in order:
        passed: list[tuple[int, int]] = []
        number = len(packs)
        while emptiest and len(passed) < PACKS_LOOKED_AT:
            entry = heapq.heappop(emptiest)
            if tokens[entry[1]] + room.lengths[i] <= room.length and tiles[entry[1]] + room.tiles[i] <= max_tiles:
                number = entry[1]
                break
            passed.append(entry)
        if number == len(packs):
            packs.append([])
            tokens.append(0)
            tiles.append(0)
        packs[number].append(i)
        tokens[number] += room.lengths[i]
        tiles[number] += room.tiles[i]
        fullness = max(tokens[number] * max_tiles, tiles[number] * room.length)
        for entry in [*passed, (fullness, number)]:
            heapq.heappush(emptiest, entry)


def pack_best_fit(
    lengths: Sizes,
    length: int,
    *,
    tiles: Sizes | None = None,
    max_tiles: int | None = None,
) -> PackPlan:
    """Longest first, each sample into the fullest pack that still has room (arguments as in ``pack_balanced``)."""
    room = _limits(lengths, length, tiles, max_tiles)
    order, too_long = room.split()
    packs: list[list[int]] = []
    held: list[int] = []
    open_packs = _BySize(length)
    for i in order:
        need = room.lengths[i]
        space = open_packs.at_least(need)
        number = None
        while space is not None and number is None:
            number = open_packs.take(space, partial(_pack_fits, room, held, i))
            if number is None:
                space = open_packs.at_least(space + 1)
        if number is None or space is None:
            space, number = length, len(packs)
            packs.append([])
            held.append(0)
        packs[number].append(i)
        held[number] += room.tiles[i]
        open_packs.put(space - need, number)
    return PackPlan(packs, too_long)


def _pack_fits(room: _PackLimits, held: list[int], sample: int, pack: int) -> bool:
    return _fits_tiles(room, held[pack], sample)


def _fits_tiles(room: _PackLimits, held: int, sample: int) -> bool:
    return room.max_tiles is None or held + room.tiles[sample] <= room.max_tiles


def pack_greedy(
    lengths: Sizes,
    length: int,
    *,
    tiles: Sizes | None = None,
    max_tiles: int | None = None,
) -> PackPlan:
    """One pack after another, each time the longest sample that still fits: the plain greedy knapsack, to compare.

    Tight, but long samples sit with long ones and the last packs hold nothing but short ones.
    """
    room = _limits(lengths, length, tiles, max_tiles)
    order, too_long = room.split()
    waiting = _BySize(length)
    for i in reversed(order):
        waiting.put(room.lengths[i], i)
    packs: list[list[int]] = []
    left = len(order)
    while left:
        pack: list[int] = []
        space, held, limit = length, 0, length
        while (size := waiting.at_most(min(space, limit))) is not None:
            sample = waiting.take(size, partial(_fits_tiles, room, held))
            if sample is None:
                limit = size - 1  # none of this size fits beside the tiles that are in
                continue
            pack.append(sample)
            space -= size
            held += room.tiles[sample]
        packs.append(pack)
        left -= len(pack)
    return PackPlan(packs, too_long)


class _BySize:
    """Things filed by a size from 0 to ``largest``, with the nearest size that is not empty found in a few steps.

    Sizes in use are bits in words of WORD bits; a second row of bits says which words are not zero.
    """

    def __init__(self, largest: int) -> None:
        self._filed: list[list[int]] = [[] for _ in range(largest + 1)]
        self._words = [0] * (largest // WORD + 1)
        self._used = 0

    def put(self, size: int, thing: int) -> None:
        if not self._filed[size]:
            self._words[size // WORD] |= 1 << (size % WORD)
            self._used |= 1 << (size // WORD)
        self._filed[size].append(thing)

    def take(self, size: int, accepts: Callable[[int], bool]) -> int | None:
        """Removes the thing of this size that came last, of those that are accepted; None if there is none."""
        filed = self._filed[size]
        for place in range(len(filed) - 1, -1, -1):
            if accepts(filed[place]):
                thing = filed.pop(place)
                if not filed:
                    self._words[size // WORD] ^= 1 << (size % WORD)
                    if not self._words[size // WORD]:
                        self._used ^= 1 << (size // WORD)
                return thing
        return None

    def at_least(self, size: int) -> int | None:
        """The smallest size in use from ``size`` on."""
        number, bit = divmod(size, WORD)
        if number >= len(self._words):
            return None
        word = self._words[number] >> bit
        if word:
            return size + _lowest(word)
        above = self._used >> (number + 1)
        if not above:
            return None
        number += 1 + _lowest(above)
        return number * WORD + _lowest(self._words[number])

    def at_most(self, size: int) -> int | None:
        """The largest size in use up to ``size``."""
        if size < 0:
            return None
        number, bit = divmod(size, WORD)
        word = self._words[number] & ((2 << bit) - 1)
        if not word:
            below = self._used & ((1 << number) - 1)
            if not below:
                return None
            number = below.bit_length() - 1
            word = self._words[number]
        return number * WORD + word.bit_length() - 1


def _lowest(word: int) -> int:
    return (word & -word).bit_length() - 1
