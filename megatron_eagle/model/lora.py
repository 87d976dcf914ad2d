"""LoRA adapters on Megatron's parallel linear layers, where they are and as they are sharded.

``attach`` gives the layers that a recipe names two more parameters, in place: names, shapes and values of the base stay
what they were, whatever built the layer. ``lora_b`` has the rows of the weight and is cut like it; ``lora_a`` has its
columns, cut where the weight's are. All that processes exchange for an adapter is [tokens, rank] wide.

A fused layer has an A for each matrix in it (q, k, v; gate, up), one below the other, as in PEFT on the separate
layers: a row of B is multiplied with the A of its own matrix.
"""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor, nn

from megatron_eagle.config.lora import LoraSettings, layer_name
from megatron_eagle.errors import UserError
from megatron_eagle.model.packed_base import Packed, whole
from megatron_eagle.model.recomputation import pass_gradients
from megatron_eagle.model.weights import weight_slices


@dataclass(frozen=True)
class _Numbers:
    """What an adapted layer has beside its parameters. name: the global one of the layer, with a dot behind it; place:
    says which dropout masks are its own."""

    name: str
    settings: LoraSettings
    place: int


class _Adapted(nn.Module):
    """What both kinds of adapted layers share."""

    lora: _Numbers
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_rows: Tensor
    tp_group: Any
    weight: nn.Parameter
    packed: Packed | None = None  # what ``weight`` held

    def _inner(self, x: Tensor) -> Tensor:
        """[..., parts * rank] of the columns that this process has."""
        if self.training and self.lora.settings.dropout:
            x = _drop(x, self.lora)
        return F.linear(x, self.lora_a) * self.lora.settings.scale

    def _outer(self, inner: Tensor) -> Tensor:
        if self.lora_rows.shape[1] == 1:
            return F.linear(inner, self.lora_b)
        return F.linear(inner, (self.lora_b[:, None] * self.lora_rows[:, :, None]).flatten(1))

    def _with_adapter(
        self, state: dict[str, Any], prefix: str, offsets: tuple[Any, ...], metadata: Any, axes: dict[str, int]
    ) -> dict[str, Any]:
        """``state`` of the layer, the adapter split along ``axes``."""
        own = {name: getattr(self, name) for name in ("lora_a", "lora_b")}
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        sharded = make_sharded_tensors_for_checkpoint(own, prefix, axes, offsets, **groups)
        if getattr(self.lora_b, "partition_stride", 1) == 2:  # as Megatron does with the weight of gate and up
            name = f"{prefix}lora_b"
            sharded[name] = apply_swiglu_sharded_factory(
                sharded[name], offsets, metadata.get("singleton_local_shards", False)
            )
        return {**state, **sharded}


class AdaptedColumn(_Adapted, ColumnParallelLinear):
    """Outputs split: every process has all of A and its rows of B."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        with whole(self.weight, self.packed):
            output, bias = super().forward(input_, *args, **kwargs)
        inner = self._inner(input_)
        # Backward, both add up what each process's rows give to the gradient of ``inner``.
        if self.sequence_parallel:
            inner = gather_from_sequence_parallel_region(inner, group=self.tp_group)
        else:
            inner = copy_to_tensor_model_parallel_region(inner, group=self.tp_group)
        return output + self._outer(inner), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return self._with_adapter(state, prefix, sharded_offsets, metadata, {"lora_b": 0})


class AdaptedRow(_Adapted, RowParallelLinear):
    """Inputs split: every process has its columns of A and all of B."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        with whole(self.weight, self.packed):
            output, bias = super().forward(input_)
        inner = self._inner(input_)
        if self.sequence_parallel:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
        else:
            inner = reduce_from_tensor_model_parallel_region(inner, group=self.tp_group)
        return output + self._outer(inner), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return self._with_adapter(state, prefix, sharded_offsets, metadata, {"lora_a": 1})


def attach(model: nn.Module, settings: LoraSettings, tp_group: Any, *, seed: int | None) -> None:
    """Give the layers of ``model`` (part of an Eagle) that ``settings`` wants an adapter.

    seed: draws A, the same in every layout, as PEFT does: uniform within inputs^-1/2 (kaiming_uniform of sqrt(5)). B is
    0. None leaves their memory as it is. Call it before the model is wrapped.
    """
    names = {id(weight.parameter): weight.name for weight in weight_slices(model, tp_group)}
    for name, module in list(model.named_modules()):
        layer = layer_name(name)
        if layer is None or not settings.wants(layer):
            continue
        if type(module) not in (ColumnParallelLinear, RowParallelLinear):
            raise UserError(f"lora: {name} is a {type(module).__name__}, which can get no adapter")
        adapted = _adapt(module, settings, names[id(module.weight)].removesuffix("weight"), tp_group)
        if seed is not None:
            _draw(adapted, seed)
    pass_gradients(model)


def pack_base(models: Iterable[nn.Module]) -> None:
    """Pack the base weight of every layer of ``models`` that has an adapter, in place and for good.

    Call it when the base is loaded and has the type that the model computes in.
    """
    for layer in _adapted(models):
        layer.packed = Packed.taken_from(layer.weight)


def packed_tensors(models: Iterable[nn.Module]) -> list[Tensor]:
    """All that layers of ``models`` hold instead of base weights."""
    packed = (layer.packed for layer in _adapted(models) if layer.packed)
    return [tensor for one in packed for tensor in (one.numbers, one.scales, one.code)]


def _adapted(models: Iterable[nn.Module]) -> Iterable[_Adapted]:
    return (module for model in models for module in model.modules() if isinstance(module, _Adapted))


def adapted_layers(model: nn.Module) -> set[str]:
    """The layers of ``model`` that have an adapter, by their names among targets."""
    names = (layer_name(name) for name, module in model.named_modules() if isinstance(module, _Adapted))
    return {name for name in names if name}


def check_targets(settings: LoraSettings, found: Collection[str]) -> None:
    """UserError names the first target that is none of ``found``, the layers of a whole model that got an adapter."""
    for target in settings.targets:
        if not any(LoraSettings(targets=(target,)).wants(layer) for layer in found):
            got = ", ".join(sorted(found)) or "none"
            raise UserError(f"lora.targets: no layer is called {target}; adapters got {got}")


def _adapt(module: Any, settings: LoraSettings, name: str, tp_group: Any) -> _Adapted:
    """name: the layer's global one, with a dot behind it."""
    weight, column = module.weight, type(module) is ColumnParallelLinear
    rows = _rows(module, name, tp_group)
    module.__class__ = AdaptedColumn if column else AdaptedRow
    like = {"dtype": weight.dtype, "device": weight.device}
    a = nn.Parameter(torch.empty(rows.shape[1] * settings.rank, weight.shape[1], **like))
    b = nn.Parameter(torch.empty(weight.shape[0], settings.rank, **like))
    split, whole = (b, a) if column else (a, b)
    set_tensor_model_parallel_attributes(split, True, weight.partition_dim, weight.partition_stride)
    whole.sequence_parallel = module.sequence_parallel  # type: ignore[attr-defined]  # its gradient is of some positions
    module.lora_a, module.lora_b = a, b
    module.register_buffer("lora_rows", rows.to(**like), persistent=False)
    module.lora = _Numbers(name, settings, _place(name, tp_group, alike=column and not module.sequence_parallel))
    return cast(_Adapted, module)


def _rows(module: Any, name: str, tp_group: Any) -> Tensor:
    """Which matrix of a fused layer each of this process's rows belongs to, [rows, matrices] of 0 and 1."""
    config, rows = module.config, len(module.weight)
    if name.endswith("linear_qkv."):
        queries = config.num_attention_heads // config.num_query_groups
        group = torch.tensor([0] * queries + [1, 2]).repeat_interleave(config.kv_channels)
        labels = group.repeat(config.num_query_groups).chunk(get_pg_size(tp_group))[get_pg_rank(tp_group)]
        return F.one_hot(labels, 3)  # with fewer heads than processes, some have no row of one of them
    if module.weight.partition_stride == 2:  # gate and up, each process its rows of both
        return F.one_hot(torch.arange(2).repeat_interleave(rows // 2), 2)
    return torch.ones(rows, 1)


@torch.no_grad()
def _draw(layer: _Adapted, seed: int) -> None:
    inputs = layer.lora_a.shape[1] * (get_pg_size(layer.tp_group) if isinstance(layer, AdaptedRow) else 1)
    digest = hashlib.sha256(f"{seed}/{layer.lora.name}lora_a".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    whole = (torch.rand(len(layer.lora_a), inputs, generator=generator) * 2 - 1) * inputs**-0.5
    if isinstance(layer, AdaptedRow):
        whole = whole.chunk(get_pg_size(layer.tp_group), 1)[get_pg_rank(layer.tp_group)]
    layer.lora_a.copy_(whole)
    layer.lora_b.zero_()


def _place(name: str, tp_group: Any, *, alike: bool) -> int:
    """What a process mixes into its draws of masks; the same on tensor-parallel processes that share their input."""
    if not dist.is_initialized():
        return 0
    rank = dist.get_process_group_ranks(tp_group)[0] if alike else dist.get_rank()
    return int.from_bytes(hashlib.sha256(f"{name}{rank}".encode()).digest()[:7], "big")


def _drop(x: Tensor, numbers: _Numbers) -> Tensor:
    """Inverted dropout. The draw is the CPU's next one, which recomputation repeats, mixed with the place."""
    if x.is_meta:
        return F.dropout(x, numbers.settings.dropout)
    seed = int(torch.randint(2**62, ())) ^ numbers.place
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.empty_like(x).bernoulli_(1 - numbers.settings.dropout, generator=generator)
    return x * kept / (1 - numbers.settings.dropout)


def seed_dropout(seed: int, step: int, phase: str) -> None:
    """Begin a step's draws of masks anew, the same on every process: however many draws others have made before."""
    digest = hashlib.sha256(f"{seed}/{step}/{phase}".encode()).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest[:7], "big"))
