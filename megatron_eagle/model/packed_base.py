"""Base weights under LoRA in NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), packed by bitsandbytes.

A layer with an adapter keeps 4 bits a number and a float32 scale for each 64 of what this process holds of its weight;
each tensor-parallel shard is packed by itself. A pass unpacks the weight to what the model computes in, multiplies as
any other layer does and lets it go; autograd keeps the packed one, and the backward pass unpacks it again.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megatron_eagle.config.lora import BLOCK
from megatron_eagle.errors import UserError


@dataclass(frozen=True)
class Packed:
    """A weight in NF4. numbers: two a byte; scales: one a block; code: the 16 values."""

    numbers: Tensor
    scales: Tensor
    code: Tensor

    @classmethod
    def taken_from(cls, weight: nn.Parameter) -> "Packed":
        """The numbers of ``weight``, which has its shape and NaNs in the room of one afterwards.

        As one row: on a CPU bitsandbytes 0.50.2 unpacks rows wrongly whose length is no multiple of a block.
        """
        data = weight.data
        numbers, state = _functional().quantize_4bit(
            data.reshape(1, -1), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
        )
        weight.data = torch.full((1,), torch.nan, dtype=data.dtype, device=data.device).expand(data.shape)
        return cls(numbers, state.absmax, state.code)

    def unpacked(self, weight: Tensor) -> Tensor:
        """The numbers in the shape and type of ``weight``."""
        state = _functional().QuantState(
            absmax=self.scales,
            shape=torch.Size((1, weight.numel())),
            code=self.code,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=weight.dtype,
        )
        numbers: Tensor = _functional().dequantize_4bit(self.numbers, state)
        return numbers.view(weight.shape)


@contextmanager
def whole(weight: nn.Parameter, packed: Packed | None) -> Iterator[None]:
    """Inside, ``weight`` has its numbers, and autograd keeps none of them. Without ``packed`` all is as it was."""
    if packed is None:
        yield
        return
    nothing = weight.data
    weight.data = numbers = packed.unpacked(nothing)
    place = numbers.untyped_storage().data_ptr()

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        return (saved.shape, saved.stride()) if saved.untyped_storage().data_ptr() == place else saved

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        return kept if isinstance(kept, Tensor) else packed.unpacked(nothing).as_strided(*kept)

    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        weight.data = nothing


def require_packing() -> None:
    """UserError if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("lora.base: nf4 needs bitsandbytes, which is not installed: pip install '.[quantised]'")


def _functional() -> Any:
    return importlib.import_module("bitsandbytes.functional")
