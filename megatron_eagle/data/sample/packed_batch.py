"""PackedBatch: the one object that walks through the house, made by the data room and read by all others."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORE_LABEL = -100


@dataclass
class PackedBatch:
    """One microbatch: a pack of fixed length L, holding several samples (segments) one after another.

    tokens: int64 [L].
    labels: int64 [L], already shifted: ``labels[i]`` is what position i must predict, or IGNORE_LABEL.
    loss_weights: float32 [L], 1/sqrt(n_i) on the n_i labelled positions of sample i, 0 elsewhere; their sum is
        sum_i sqrt(n_i), the denominator of Eagle's square-root average (NVlabs/Eagle, ``pre_calc_loss_weight``).
    position_ids: int64 [L], restarting at 0 in every segment.
    cu_seqlens: int32 [k+1], borders of the k segments, from 0 to L; padding, if any, is the last segment.
    tiles: uint8 [n, 3, s, s], RGB, all tiles of the pack in order of appearance; n may be 0. Once packs were handed
        round, a process may hold only those that it encodes itself (``parallel/distribute_batch.py``).
    tile_slots: int64 [n], position in the pack of each tile's first token; a tile's tokens are contiguous.
    sample_ids: one id per real sample, in order (for logs and errors).
    useful_tokens: L minus the padding.
    rejected: (sample id, reason) of samples that were skipped since the pack before this one.
    """

    tokens: Tensor
    labels: Tensor
    loss_weights: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    tiles: Tensor
    tile_slots: Tensor
    sample_ids: list[str]
    useful_tokens: int
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        length = len(self.tokens)
        if int(self.cu_seqlens[0]) != 0 or int(self.cu_seqlens[-1]) != length:
            first, last = int(self.cu_seqlens[0]), int(self.cu_seqlens[-1])
            raise ValueError(f"cu_seqlens runs from {first} to {last}, the pack is 0 to {length}")
        if len(self.tiles) > len(self.tile_slots):
            raise ValueError(f"{len(self.tiles)} tiles but {len(self.tile_slots)} tile_slots")

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def normaliser(self) -> float:
        """sum_i sqrt(n_i) over the pack's samples."""
        return float(self.loss_weights.sum())

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with every tensor on ``device``."""
        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return PackedBatch(**{**vars(self), **moved})
