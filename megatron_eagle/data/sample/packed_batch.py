"""PackedBatch: the one object that goes through the whole trainer, made by ``data`` and read by all others.

What decides sizes and paths - borders of segments, places of tiles, counts - it knows twice: as tensors for the device,
and as whole numbers for the host. Reading a number back from a GPU stops the host until the GPU has caught up with it,
and then the GPU until the host has something new for it to do.
"""

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
    tiles: uint8 [n, 3, s, s], RGB, all tiles of the pack in order of appearance; n may be 0. Once packs were
        distributed, a process may hold only those that it encodes itself (``parallel/distribute_batch.py``).
    tile_slots: int64 [n], position in the pack of each tile's first token; a tile's tokens are contiguous.
    sample_ids: one id per real sample, in order (for logs and errors).
    useful_tokens: L minus the padding.
    rejected: (sample id, reason) of samples that were skipped since the pack before this one.
    borders, tile_starts: ``cu_seqlens`` and ``tile_slots`` on the host. Taken from these tensors if left out, which a
        pack made on an accelerator must not do (ValueError); who replaces one of the tensors replaces its numbers.
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
    borders: tuple[int, ...] = ()
    tile_starts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.borders = self.borders or _on_host(self.cu_seqlens)
        self.tile_starts = self.tile_starts or _on_host(self.tile_slots)
        if (len(self.borders), len(self.tile_starts)) != (len(self.cu_seqlens), len(self.tile_slots)):
            raise ValueError(
                f"{len(self.borders)} borders and {len(self.tile_starts)} tile_starts on the host, "
                f"{len(self.cu_seqlens)} cu_seqlens and {len(self.tile_slots)} tile_slots as tensors"
            )
        if self.borders[0] != 0 or self.borders[-1] != self.length:
            raise ValueError(
                f"cu_seqlens runs from {self.borders[0]} to {self.borders[-1]}, the pack is 0 to {self.length}"
            )
        if len(self.tiles) > len(self.tile_slots):
            raise ValueError(f"{len(self.tiles)} tiles but {len(self.tile_slots)} tile_slots")

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """Tokens of each segment, padding included."""
        return tuple(stop - start for start, stop in zip(self.borders[:-1], self.borders[1:], strict=True))

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with every tensor on ``device``."""
        moved = {name: to_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return PackedBatch(**{**vars(self), **moved})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, without the host waiting: a copy to a GPU starts from pinned memory."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _on_host(numbers: Tensor) -> tuple[int, ...]:
    if not len(numbers):
        return ()
    if numbers.device.type != "cpu":
        raise ValueError(f"a pack on {numbers.device} needs its borders and tile_starts as whole numbers")
    return tuple(numbers.tolist())
