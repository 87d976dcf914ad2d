"""Packs that look like trouble: what layouts are verified on.

One global batch of eight samples, the same in every row, either packed or each sample in a pack of its own. Between
them are the cases that break trainers: an image of thirteen tiles, several images in a sample, samples and whole packs
without any tile, a segment longer than a context-parallel chunk, a sample that fills its pack, padding behind all
others.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from megatron_eagle.config.model import EagleConfig, tokens_per_tile
from megatron_eagle.data.sample.assemble import Segment, assemble_pack
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch

Packing = Literal["packed", "single"]
PACK_LENGTH = 128

# (text tokens, labelled tokens at the end, tiles of each image); tokens of a tile come in addition.
_SAMPLES: tuple[tuple[int, int, tuple[int, ...]], ...] = (
    (28, 9, (5, 1)),  # with the next one: two images in a sample, and a segment without tiles behind it
    (40, 25, ()),
    (76, 16, (13,)),  # fills its pack: 76 + 13 * 4 = 128
    (70, 30, ()),  # a whole pack without tiles
    (33, 1, ()),
    (9, 4, (1,)),
    (12, 2, (2, 3, 1)),
    (20, 7, (4,)),
)
_PACKS: tuple[tuple[int, ...], ...] = ((0, 1), (2,), (3, 4), (5, 6, 7))


def make_step(config: EagleConfig, packing: Packing, seed: int) -> list[PackedBatch]:
    """One global batch: four packs of several samples (``packed``) or eight packs of one (``single``).

    The samples are the same either way; they depend on ``seed`` and the model's vocabulary and tile size only.
    """
    segments = [make_segment(config, number, seed) for number in range(len(_SAMPLES))]
    arrangement: Sequence[tuple[int, ...]] = _PACKS if packing == "packed" else [(n,) for n in range(len(segments))]
    return [assemble_pack([segments[number] for number in pack], PACK_LENGTH, pad_id=0) for pack in arrangement]


def make_segment(config: EagleConfig, number: int, seed: int) -> Segment:
    """Sample ``number`` with random tokens and pixels; images stand one after another near its start."""
    text, labelled, images = _SAMPLES[number]
    generator = torch.Generator().manual_seed(1000 * seed + number)
    cost, tiles = tokens_per_tile(config), sum(images)
    length = text + tiles * cost
    tokens = torch.randint(1, config.language.vocab_size, (length,), generator=generator)
    labels = torch.where(torch.arange(length) >= length - labelled, tokens, IGNORE_LABEL)
    starts, position = [], 2
    for count in images:
        starts += [position + tile * cost for tile in range(count)]
        position += count * cost + 1
    side = config.tile_size
    return Segment(
        sample_id=f"sample-{number}",
        tokens=tokens,
        labels=labels,
        tile_slots=torch.tensor(starts, dtype=torch.int64),
        tiles=torch.randint(0, 256, (tiles, 3, side, side), dtype=torch.uint8, generator=generator),
    )
