"""Best-fit decreasing: few packs with little padding, but long samples sit with long ones."""

from functools import partial

from megatron_eagle.data.order.sample_sizes import SampleSizes
from megatron_eagle.data.order.size_buckets import SizeBuckets


def pack(samples: SampleSizes, spare: int) -> list[list[int]]:
    """Longest first, each sample into the fullest pack into which it fits; ``spare`` is ignored."""
    packs: list[list[int]] = []
    held: list[int] = []
    open_packs = SizeBuckets(samples.length)  # by the tokens that still fit
    for i in samples.longest_first:
        need = samples.lengths[i]
        space = open_packs.at_least(need)
        number = None
        while space is not None and number is None:
            number = open_packs.take(space, partial(_has_tiles_left, samples, held, i))
            if number is None:
                space = open_packs.at_least(space + 1)
        if number is None or space is None:
            space, number = samples.length, len(packs)
            packs.append([])
            held.append(0)
        packs[number].append(i)
        held[number] += samples.tiles[i]
        open_packs.put(space - need, number)
    return packs


def _has_tiles_left(samples: SampleSizes, held: list[int], sample: int, number: int) -> bool:
    return samples.fits_tiles(held[number], sample)
