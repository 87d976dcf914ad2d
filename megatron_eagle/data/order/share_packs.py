"""Which of a replica's context-parallel ranks share each pack of a step, so that none of them waits long.

Cut for all ranks, every pack pays for an exchange of keys and values, and many did not need it. On one rank each, none
pays, and all ranks wait for the pack with the longest segment. Here costly packs go to many ranks and cheap ones to
few, as in Megatron's hybrid context parallelism and FlexSP. Groups are aligned and of a power of two, so a rank is in
one group of each size; all take larger groups first and equal ones in the packs' order, so that no ranks wait for each
other in a circle.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

# What the exchange of keys and values costs each rank of a group, in parts of a pack's tokens: 0.2 to 0.3 % of the work
# on a pack of Qwen2.5-7B inside a node, 1.0 to 1.2 % between nodes, by benchmarks/long_packs.py.
EXCHANGE = 0.01


@dataclass(frozen=True)
class PackWork:
    """What a pack asks of the ranks that share it, in tokens of the language model (``balance_ranks.pack_costs``).

    shared: divided among them. repeated: by each of them, such as tiles where every rank of a pack encodes all of them.
    exchange: by each of them if they are several.
    """

    shared: float
    repeated: float
    exchange: float

    def of_each(self, ranks: int) -> float:
        """Of each of ``ranks`` ranks."""
        return self.shared / ranks + self.repeated + self.exchange * (ranks > 1)

    @staticmethod
    def of_segments(segments: Sequence[int], tiles: int, attention_parity: int, tile_cost: float) -> "PackWork":
        """segments: tokens of each, padding included."""
        length = sum(segments)
        shared = length + sum(own**2 for own in segments) / attention_parity
        return PackWork(shared, tiles * tile_cost, EXCHANGE * length)


def share_packs(packs: Sequence[PackWork], ranks: int, fewest: int = 1) -> list[range]:
    """The ranks of each pack; a pure function of its arguments. Every rank gets a pack.

    ranks: among whom packs are shared; fewest: ranks of a pack at least. Raises ValueError unless ``fewest`` x a power
    of two is ``ranks``.
    """
    sizes = group_sizes(ranks, fewest)
    order = sorted(range(len(packs)), key=lambda pack: (-packs[pack].shared, pack))
    table = [[packs[pack].of_each(size) for pack in order] for size in sizes]
    ends = [[len(packs)] * whole + [0] * (len(sizes) - 1 - whole) for whole in range(len(sizes))]
    best = min((_improved(_Way.of(table, sizes, reach), table, sizes) for reach in ends), key=lambda way: way.slowest)
    groups = dict(zip(order, best.groups, strict=True))
    return [groups[pack] for pack in range(len(packs))]


def group_sizes(ranks: int, fewest: int) -> list[int]:
    """Sizes of the groups that may share a pack, smallest first; ValueError unless each is twice the one before."""
    sizes = [fewest]
    while sizes[-1] < ranks:
        sizes.append(2 * sizes[-1])
    if sizes[-1] != ranks:
        raise ValueError(f"{ranks} ranks cannot be halved into groups of {fewest}")
    return sizes


def in_order(shares: Sequence[range]) -> list[int]:
    """The packs in the order in which every rank takes those that it shares."""
    return sorted(range(len(shares)), key=lambda pack: -len(shares[pack]))


def rank_times(times: Sequence[float], shares: Sequence[range], ranks: int) -> list[float]:
    """When each rank is through its packs. times: of each pack, on each of its ranks, who begin it together."""
    ends = [0.0] * ranks
    for pack in in_order(shares):
        own = slice(shares[pack].start, shares[pack].stop)
        ends[own] = [max(ends[own]) + times[pack]] * len(shares[pack])
    return ends


@dataclass(frozen=True)
class _Way:
    """A way to share packs, costliest first. reach: how many of them get at least the second size, the third, ...

    groups: of each pack. slowest: when the last rank is through; infinite if one has nothing to do.
    """

    reach: list[int]
    groups: list[range]
    slowest: float

    @staticmethod
    def of(table: list[list[float]], sizes: list[int], reach: list[int]) -> "_Way":
        """table: what a pack costs each rank of its group, by size, then pack. Each goes to the group free first."""
        loads = [0.0] * sizes[-1]
        found: list[range] = []
        ends = [len(table[0]), *reach, 0]
        for level in reversed(range(len(sizes))):
            size = sizes[level]
            free = [(max(loads[first : first + size]), first) for first in range(0, sizes[-1], size)]
            heapq.heapify(free)
            for pack in range(ends[level + 1], ends[level]):
                load, first = free[0]
                heapq.heapreplace(free, (load + table[level][pack], first))
                found.append(range(first, first + size))
            for load, first in free:
                loads[first : first + size] = [load] * size
        return _Way(reach, found, max(loads) if min(loads) > 0 else float("inf"))


def _improved(way: _Way, table: list[list[float]], sizes: list[int]) -> _Way:
    """Moves one end of ``way.reach`` at a time, by ever smaller steps, while that makes the slowest rank faster."""
    packs = len(table[0])
    step = packs
    while step:
        tried = [_moved(way.reach, level, change) for level in range(len(way.reach)) for change in (step, -step)]
        ordered = [ends for ends in tried if [packs, *ends, 0] == sorted([packs, *ends, 0], reverse=True)]
        best = min((_Way.of(table, sizes, ends) for ends in ordered), key=lambda one: one.slowest, default=way)
        if best.slowest < way.slowest:
            way = best
        else:
            step //= 2
    return way


def _moved(reach: list[int], level: int, change: int) -> list[int]:
    return [end + change * (number == level) for number, end in enumerate(reach)]
