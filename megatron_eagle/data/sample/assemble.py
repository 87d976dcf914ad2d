"""Segments -> one PackedBatch: laid one after another, labels shifted within each, padding last."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch


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


def padding_pack(length: int, pad_id: int, tile_size: int) -> PackedBatch:
    """A pack of nothing but padding, for one whose every sample turned out to be broken: no other pack moves up."""
    return PackedBatch(
        tokens=torch.full((length,), pad_id),
        labels=torch.full((length,), IGNORE_LABEL),
        loss_weights=torch.zeros(length),
        position_ids=torch.arange(length),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        tiles=torch.empty((0, 3, tile_size, tile_size), dtype=torch.uint8),
        tile_slots=torch.empty(0, dtype=torch.int64),
        sample_ids=[],
        useful_tokens=0,
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
