"""Whole weights and the slices of them that one process holds.

Every parameter has a global name - that of an undivided model - and a full shape. From these a model is drawn at random
or filled from a checkpoint with the same numbers in every layout: the value of a parameter depends on the seed and its
global name only, each process keeps its slice.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor, nn

from megatron_eagle.model.specs import NORMS_IN_CHECKPOINTS

EMBEDDING = "language.embedding.word_embeddings.weight"
_DECODER_LAYER = re.compile(r"^(language\.decoder\.layers\.)(\d+)(\..*)$")


@dataclass(frozen=True)
class WeightSlice:
    """One parameter of this process and its place in the whole.

    name: global name; layers are counted over all pipeline stages.
    dim: dimension that is split over the tensor-parallel processes, None if every process has all of it.
    stride: how many tensors lie one after another in ``dim``, each split by itself (2 for gate and up of SwiGLU).
    """

    name: str
    parameter: nn.Parameter
    dim: int | None
    stride: int
    tp_rank: int
    tp_size: int

    @property
    def full_shape(self) -> tuple[int, ...]:
        shape = list(self.parameter.shape)
        if self.dim is not None:
            shape[self.dim] *= self.tp_size
        return tuple(shape)

    @property
    def fan_in(self) -> int:
        """Inputs that one output of the whole matrix or convolution adds up."""
        return math.prod(self.full_shape[1:])

    def cut(self, full: Tensor) -> Tensor:
        """This process's part of the whole weight; ValueError if ``full`` has another shape than ``full_shape``."""
        if tuple(full.shape) != self.full_shape:
            raise ValueError(f"{self.name} needs shape {list(self.full_shape)}, got {list(full.shape)}")
        if self.dim is None:
            return full
        return torch.cat(full.chunk(self.stride * self.tp_size, self.dim)[self.tp_rank :: self.tp_size], self.dim)

    @torch.no_grad()
    def fill(self, full: Tensor) -> None:
        """Copy this process's part of ``full`` into the parameter."""
        self.parameter.copy_(self.cut(full))


def weight_slices(model: nn.Module, tp_group: Any) -> Iterator[WeightSlice]:
    """Every parameter of an EagleModel (or of one stage of it) under its global name."""
    rank, size = get_pg_rank(tp_group), get_pg_size(tp_group)
    layer_numbers = {
        name: module.layer_number - 1
        for name, module in model.named_modules()
        if re.fullmatch(r"language\.decoder\.layers\.\d+", name)
    }
    for name, parameter in model.named_parameters():
        if match := _DECODER_LAYER.match(name):
            name = f"{match[1]}{layer_numbers[match[1] + match[2]]}{match[3]}"
        if getattr(parameter, "shared", False):  # Megatron's mark of the last stage's copy of a tied embedding
            name = EMBEDDING
        for ours, transformer_engine in NORMS_IN_CHECKPOINTS.items():
            name = name.replace(transformer_engine, ours)
        split = getattr(parameter, "tensor_model_parallel", False)
        stride = getattr(parameter, "partition_stride", 1) if split else 1
        dim = getattr(parameter, "partition_dim", None) if split else None
        yield WeightSlice(name, parameter, dim, stride, rank, size)


def initialise(model: nn.Module, tp_group: Any, *, seed: int, language_std: float) -> None:
    """Draw all weights of an EagleModel, the same in every layout.

    Norms, biases and layer scales keep the values that their modules were built with (1, 0, the recipe's). Language
    matrices: normal with ``language_std`` (Qwen2's ``initializer_range``). Encoder and connector matrices: normal with
    standard deviation fan_in^-1/2, which keeps the size of activations through an untrained encoder.
    """
    for weight in weight_slices(model, tp_group):
        if weight.parameter.is_meta:
            raise ValueError(f"{weight.name} has no memory: a model on the meta device cannot be initialised")
        if len(weight.full_shape) == 1:
            if weight.name.endswith(".bias"):
                nn.init.zeros_(weight.parameter)
            continue
        std = language_std if weight.name.startswith("language.") else weight.fan_in**-0.5
        digest = hashlib.sha256(f"{seed}/{weight.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        weight.fill(torch.randn(weight.full_shape, generator=generator) * std)


class ShardedList(nn.ModuleList):
    """A ModuleList that lets its modules say themselves how their weights are split in a checkpoint."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, module in self.named_children():
            state |= sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata)
        return state
