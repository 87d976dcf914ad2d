"""The plain greedy knapsack, one pack after another: tight, but the last packs hold nothing but short samples."""

from functools import partial

from megatron_eagle.data.order.sample_sizes import SampleSizes
from megatron_eagle.data.order.size_buckets import SizeBuckets


def pack(samples: SampleSizes, spare: int) -> list[list[int]]:
    """Each time the longest sample that still fits; ``spare`` is ignored."""
    waiting = SizeBuckets(samples.length)
    for i in reversed(samples.longest_first):
        waiting.put(samples.lengths[i], i)
    packs: list[list[int]] = []
    left = len(samples.longest_first)
    while left:
        packs.append(_fill(samples, waiting))
        left -= len(packs[-1])
    return packs


def _fill(samples: SampleSizes, waiting: SizeBuckets) -> list[int]:
    """Takes one pack's samples out of ``waiting``."""
    own: list[int] = []
    space, held, limit = samples.length, 0, samples.length
    while (size := waiting.at_most(min(space, limit))) is not None:
        sample = waiting.take(size, partial(samples.fits_tiles, held))
        if sample is None:
            limit = size - 1  # none of this size fits beside the tiles that are in
            continue
        own.append(sample)
        space -= size
        held += samples.tiles[sample]
    return own
