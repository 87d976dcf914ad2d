"""A digest of a model's weights that no layout changes: by it adapters know the base they belong to.

Each process digests what it holds: the sum, modulo 2^64, of every number's bits times a coefficient of its row and one
of its column in the undivided weight. Numbers are rounded to bf16 first, so that a base is known again whatever
precision it is held in. It tells models apart; it is no protection against intent.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_eagle.config.lora import is_adapter
from megatron_eagle.model.weights import WeightSlice, weight_slices

_NUMBERS_AT_ONCE = 1 << 22
_MASK = (1 << 64) - 1


def base_digest(models: Sequence[MegatronModule], replica: dist.ProcessGroup, copy: MegatronModule | None) -> str:
    """Digest of all weights but adapters', the same on every process; 16 hexadecimal digits.

    models: this process's part of what the processes of ``replica`` share, parts of an Eagle. copy: its own spread
    encoders, if any.
    """
    own = sum(_digest_of_slice(weight) for model in models for weight in weight_slices(model, model.tp_group))
    total = torch.tensor([_signed(own)], dtype=torch.int64, device=next(models[0].parameters()).device)
    dist.all_reduce(total, group=replica)
    spread = sum(_digest_of_slice(weight) for weight in weight_slices(copy, copy.tp_group)) if copy else 0
    return as_text(int(total) + spread)


def as_text(digest: int) -> str:
    """A sum of digests as checkpoints name it."""
    return f"{digest & _MASK:016x}"


def digest_of(name: str, values: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> int:
    """Digest of a weight, or of the ``rows`` and ``columns`` of it that ``values`` are."""
    table = values.detach().reshape(len(values), -1)
    rows = torch.arange(table.shape[0]) if rows is None else rows
    columns = torch.arange(table.shape[1]) if columns is None else columns
    down = _coefficients(f"{name} rows", rows).to(table.device)
    along = _coefficients(f"{name} columns", columns).to(table.device)
    total = torch.zeros((), dtype=torch.int64, device=table.device)
    step = max(1, _NUMBERS_AT_ONCE // table.shape[1])
    for part, factors in zip(table.split(step), down.split(step), strict=True):
        bits = part.to(torch.bfloat16).contiguous().view(torch.int16).to(torch.int64) + 1  # no number counts as nothing
        total += ((bits * along).sum(1) * factors).sum()
    return int(total)


def _digest_of_slice(weight: WeightSlice) -> int:
    """0 for what another process of the replica answers for: copies, and a tied embedding's second place."""
    copy = weight.dim is None and weight.tp_rank > 0
    if is_adapter(weight.name) or copy or getattr(weight.parameter, "shared", False):
        return 0
    places = [None, None] if weight.dim is None else [_places(weight, 0), _places(weight, 1)]
    return digest_of(weight.name, weight.parameter, *places)


def _places(weight: WeightSlice, dim: int) -> Tensor | None:
    """Which rows (0) or columns (1) of the whole this process has; None for all."""
    if weight.dim != dim:
        return None
    parts = torch.arange(weight.full_shape[dim]).chunk(weight.stride * weight.tp_size)
    return torch.cat(parts[weight.tp_rank :: weight.tp_size])


def _coefficients(key: str, places: Tensor) -> Tensor:
    """Odd numbers of 64 bits, one a place, as different as can be (steps of SplitMix64)."""
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    mixed = (places + start) * _signed(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> 30)) * _signed(0xBF58476D1CE4E5B9)
    return (mixed ^ (mixed >> 27)) | 1


def _signed(number: int) -> int:
    """The same 64 bits as torch's int64 has them."""
    number &= _MASK
    return number - (1 << 64) if number >> 63 else number
