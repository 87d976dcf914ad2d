"""Which samples share a pack, and what a pack holds.

Choosing is a pure function of lengths. ``balanced`` is Eagle 2's balance-aware greedy knapsack (arXiv 2501.14818;
NVlabs/Eagle, ``balanced_greedy_knapsack`` in Megatron-LM's multimodal example is the same idea): more packs than
strictly needed, each sample into the emptiest, so that every pack becomes a similar mix of long and short samples.
``best_fit`` is best-fit decreasing: fewest packs, but long samples sit with long ones. Eagle 2 measured that balance
is worth more than the last percent of fill.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.data.batch import IGNORE_LABEL, PackedBatch


@dataclass
class Segment:
    """One sample, ready to be packed.

    tokens, labels: int64 [n]; labels are not shifted yet: ``labels[i]`` is ``tokens[i]`` where it is learned.
    tile_slots: int64 [t], position in ``tokens`` of each tile's first token.
    tiles: uint8 [t, 3, s, s].
    """

    sample_id: str
    tokens: Tensor
    labels: Tensor
    tile_slots: Tensor
    tiles: Tensor


@dataclass
class PackPlan:
    """Indices into the lengths that were given: the packs, and what fits into no pack at all."""

    packs: list[list[int]]
    too_long: list[int]


@dataclass(frozen=True)
class _Room:
    """The sizes of the samples and what one pack can hold: tokens always, tiles if ``max_tiles`` is given."""

    lengths: Sequence[int]
    length: int
    tiles: Sequence[int]
    max_tiles: float

    def split(self) -> tuple[list[int], list[int]]:
        """(samples that fit into an empty pack, longest first; samples that do not)."""
        order = sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i))
        fits = [i for i in order if self.lengths[i] <= self.length and self.tiles[i] <= self.max_tiles]
        return fits, sorted(set(order) - set(fits))


def _room(lengths: Sequence[int], length: int, tiles: Sequence[int] | None, max_tiles: int | None) -> _Room:
    if max_tiles is not None and tiles is None:
        raise ValueError(f"max_tiles={max_tiles} needs the tiles of each sample")
    if tiles is not None and len(tiles) != len(lengths):
        raise ValueError(f"{len(lengths)} lengths but {len(tiles)} tile counts")
    if min(lengths, default=1) < 1:
        raise ValueError(f"a sample of {min(lengths)} tokens cannot be packed")
    return _Room(lengths, length, tiles or [0] * len(lengths), math.inf if max_tiles is None else max_tiles)


def pack_balanced(
    lengths: Sequence[int],
    length: int,
    *,
    delta: int,
    tiles: Sequence[int] | None = None,
    max_tiles: int | None = None,
) -> PackPlan:
    """Longest first, each sample into the emptiest of ceil(sum / length) + delta packs, or a new one if it is too big.

    lengths: tokens of each sample; length: tokens of a pack; delta: packs more than the samples need (Eagle: 20 on
    thousands of samples). tiles, max_tiles: optional second bound, tiles of each sample and of a pack.
    """
    room = _room(lengths, length, tiles, max_tiles)
    order, too_long = room.split()
    needed = math.ceil(sum(lengths[i] for i in order) / length)
    packs: list[list[int]] = [[] for _ in range(needed + delta)]
    held = [0] * len(packs)
    emptiest = [(0, number) for number in range(len(packs))]
    for i in order:
        fill, number = emptiest[0]
        if fill + lengths[i] > length or held[number] + room.tiles[i] > room.max_tiles:
            number = len(packs)
            packs.append([])
            held.append(0)
            heapq.heappush(emptiest, (lengths[i], number))
        else:
            heapq.heapreplace(emptiest, (fill + lengths[i], number))
        packs[number].append(i)
        held[number] += room.tiles[i]
    return PackPlan([pack for pack in packs if pack], too_long)


def pack_best_fit(
    lengths: Sequence[int],
    length: int,
    *,
    tiles: Sequence[int] | None = None,
    max_tiles: int | None = None,
) -> PackPlan:
    """Longest first, each sample into the fullest pack that still has room (arguments as in ``pack_balanced``)."""
    room = _room(lengths, length, tiles, max_tiles)
    order, too_long = room.split()
    packs: list[list[int]] = []
    held: list[int] = []
    free: list[tuple[int, int]] = []
    for i in order:
        at = bisect_left(free, (lengths[i], -1))
        while at < len(free) and held[free[at][1]] + room.tiles[i] > room.max_tiles:
            at += 1
        if at < len(free):
            space, number = free.pop(at)
        else:
            space, number = length, len(packs)
            packs.append([])
            held.append(0)
        packs[number].append(i)
        held[number] += room.tiles[i]
        insort(free, (space - lengths[i], number))
    return PackPlan(packs, too_long)


def assemble_pack(segments: Sequence[Segment], length: int, pad_id: int) -> PackedBatch:
    """Lays the segments one after another and pads to ``length`` tokens; raises ValueError if they do not fit."""
    if not segments:
        raise ValueError("a pack needs at least one segment")
    sizes = [len(segment.tokens) for segment in segments]
    useful = sum(sizes)
    if useful > length:
        raise ValueError(f"{len(sizes)} segments of {sizes} tokens add up to {useful}, a pack holds {length}")
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    padding = length - useful
    labels = [shift_labels(segment.labels) for segment in segments]
    borders = [*starts, useful] + ([length] if padding else [])
    return PackedBatch(
        tokens=torch.cat([*(segment.tokens for segment in segments), torch.full((padding,), pad_id)]),
        labels=torch.cat([*labels, torch.full((padding,), IGNORE_LABEL)]),
        loss_weights=torch.cat([*map(weigh_labels, labels), torch.zeros(padding)]),
        position_ids=torch.cat([torch.arange(size) for size in [*sizes, padding]]),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        tiles=torch.cat([segment.tiles for segment in segments]),
        tile_slots=torch.cat([segment.tile_slots + start for segment, start in zip(segments, starts, strict=True)]),
        sample_ids=[segment.sample_id for segment in segments],
        useful_tokens=useful,
    )


def shift_labels(labels: Tensor) -> Tensor:
    """int64 [n] -> int64 [n]: what each position must predict, i.e. the label after it; the last predicts nothing."""
    return torch.cat([labels[1:], labels.new_full((1,), IGNORE_LABEL)])


def weigh_labels(labels: Tensor) -> Tensor:
    """float32 [n]: 1/sqrt(k) on the k learned positions of one sample's shifted labels, 0 elsewhere.

    Square-root averaging, NVlabs/Eagle ``pre_calc_loss_weight``, before the division by the sum over samples.
    """
    learned = labels != IGNORE_LABEL
    return learned.float() / learned.sum().clamp(min=1).sqrt()
