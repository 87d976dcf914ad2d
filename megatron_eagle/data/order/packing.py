"""Packs samples by a rule's name, and holds what the rule made against what it was given."""

import math
from dataclasses import dataclass
from itertools import chain

import numpy as np

from megatron_eagle.config.data import DataSettings
from megatron_eagle.data.order.rules import packing_rule
from megatron_eagle.data.order.sample_sizes import SampleSizes, Sizes


@dataclass(frozen=True)
class PackPlan:
    """Indices into the lengths that were given: the packs, and what fits into no pack at all."""

    packs: list[list[int]]
    too_long: list[int]


def pack_samples(
    rule: str,
    lengths: Sizes,
    length: int,
    *,
    tiles: Sizes | None = None,
    max_tiles: int | None = None,
    spare: int = 0,
) -> PackPlan:
    """Packs samples by the rule of that name.

    lengths: tokens of each sample; length: tokens of a pack. tiles, max_tiles: optional second bound, tiles of each
    sample and of a pack. spare: packs beyond those that the samples need.
    Raises ValueError for sizes that make no sense, and for packs of a rule that do not hold what they should.
    """
    samples = SampleSizes.of(lengths, length, tiles, max_tiles)
    packs = packing_rule(rule)(samples, spare)
    _check(rule, samples, packs)
    return PackPlan(packs, samples.too_long)


def pack_by_settings(settings: DataSettings, lengths: Sizes, tiles: Sizes) -> PackPlan:
    """Packs the samples of a window or a buffer as a stage's settings ask. lengths, tiles: of each sample."""
    return pack_samples(
        settings.reading.packing,
        lengths,
        settings.pack_length,
        tiles=tiles,
        max_tiles=settings.reading.max_tiles_per_pack,
        spare=settings.reading.spare_packs(math.ceil(int(np.sum(lengths)) / settings.pack_length)),
    )


def _check(rule: str, samples: SampleSizes, packs: list[list[int]]) -> None:
    """Every sample that fits is in one pack, and no pack is empty or holds more than it can."""
    members = np.fromiter(chain.from_iterable(packs), dtype=np.int64)
    times = np.bincount(members, minlength=len(samples.lengths))
    wanted = np.zeros(len(times), dtype=np.int64)
    wanted[samples.longest_first] = 1
    wrong = np.flatnonzero(times != wanted)
    if len(wrong):
        raise ValueError(
            f"packing rule '{rule}' put sample {wrong[0]} into {times[wrong[0]]} packs instead of {wanted[wrong[0]]}, "
            f"and so for {len(wrong)} of {len(wanted)} samples"
        )
    if not packs:
        return
    sizes = np.array([len(pack) for pack in packs])
    if not sizes.all():
        raise ValueError(f"packing rule '{rule}' made {np.count_nonzero(sizes == 0)} empty packs of {len(packs)}")
    starts = np.cumsum(sizes) - sizes
    for name, own, limit in (("tokens", samples.lengths, samples.length), ("tiles", samples.tiles, samples.max_tiles)):
        most = int(np.add.reduceat(np.array(own, dtype=np.int64)[members], starts).max())
        if limit is not None and most > limit:
            raise ValueError(f"packing rule '{rule}' made a pack of {most} {name}, it can hold {limit}")
