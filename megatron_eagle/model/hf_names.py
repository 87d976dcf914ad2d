"""Which Hugging Face tensors make up which of our parameters: the language model and the connector, and the means.

``HfTensors`` says, for one parameter of the undivided model, the names in a Hugging Face state dict, how their tensors
become one, and how that one is taken apart again. ``load`` fills a model from such a state dict, in any layout. Names
are those of transformers' Qwen2ForCausalLM and of ``mlp1`` of the released Eagle 2 models; ``prefix`` is put before
them for checkpoints that hold several models. Encoders' names are in their own folders.

Megatron's own arrangements: Q, K and V are one matrix, grouped by key/value head (the group's query heads, its key
head, its value head); gate and up projection are one matrix, gate first.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_eagle.config.lora import LoraSettings, layer_name
from megatron_eagle.config.model import QwenConfig
from megatron_eagle.errors import UserError
from megatron_eagle.model.weights import EMBEDDING, weight_slices


def _only(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def _single(tensor: Tensor) -> Sequence[Tensor]:
    return (tensor,)


@dataclass(frozen=True)
class HfTensors:
    """names: tensors of a Hugging Face state dict; join: makes the whole parameter of them, given in that order;
    split: its inverse."""

    names: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor] = _only
    split: Callable[[Tensor], Sequence[Tensor]] = _single


HfNames = dict[str, HfTensors]
Changes = dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]]
"""Tensors of a checkpoint that a new model needs otherwise: name -> (their shape then, how to make them)."""


class Shaped(Protocol):
    """What is known of a tensor that has not been read."""

    @property
    def shape(self) -> tuple[int, ...]: ...


Infos = Mapping[str, Shaped]


def load(model: nn.Module, sources: HfNames, state: Mapping[str, Tensor], tp_group: Any) -> None:
    """Fill the parameters that ``sources`` names and this process holds from ``state``, cutting out its share.

    Raises UserError if a tensor is missing or has the wrong shape.
    """
    for weight in weight_slices(model, tp_group):
        source = sources.get(weight.name)
        if source is None:
            continue
        missing = [name for name in source.names if name not in state]
        if missing:
            raise UserError(f"{weight.name} needs {', '.join(missing)}, which the checkpoint does not have")
        try:
            weight.fill(source.join([state[name] for name in source.names]))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{', '.join(source.names)}: {error}") from None


def qwen_sources(config: QwenConfig, prefix: str = "") -> HfNames:
    """Qwen2ForCausalLM -> ``language``."""
    pad = partial(_pad_rows, rows=config.padded_vocab_size, expected=config.vocab_size)
    trim = partial(_trim_rows, rows=config.vocab_size)
    sources = {
        EMBEDDING: HfTensors((f"{prefix}model.embed_tokens.weight",), pad, trim),
        "language.decoder.final_layernorm.weight": HfTensors((f"{prefix}model.norm.weight",)),
    }
    if not config.tie_word_embeddings:
        sources["language.output_layer.weight"] = HfTensors((f"{prefix}lm_head.weight",), pad, trim)
    for number in range(config.num_hidden_layers):
        ours, theirs = f"language.decoder.layers.{number}.", f"{prefix}model.layers.{number}."
        letters = tuple(f"{theirs}self_attn.{letter}_proj" for letter in "qkv")
        sources |= qkv(ours, letters, config.num_attention_heads, config.num_key_value_heads)
        sources |= {
            f"{ours}input_layernorm.weight": HfTensors((f"{theirs}input_layernorm.weight",)),
            f"{ours}self_attention.linear_proj.weight": HfTensors((f"{theirs}self_attn.o_proj.weight",)),
            f"{ours}pre_mlp_layernorm.weight": HfTensors((f"{theirs}post_attention_layernorm.weight",)),
            f"{ours}mlp.linear_fc1.weight": HfTensors(
                (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"), _one_below_the_other, _halves
            ),
            f"{ours}mlp.linear_fc2.weight": HfTensors((f"{theirs}mlp.down_proj.weight",)),
        }
    return sources


def connector_sources(prefix: str = "mlp1.") -> HfNames:
    """The Sequential(LayerNorm, Linear, GELU, Linear) of Eagle2ChatModel -> ``connector``."""
    return {
        **weight_and_bias("connector.norm", f"{prefix}0"),
        **weight_and_bias("connector.linear_fc1", f"{prefix}1"),
        **weight_and_bias("connector.linear_fc2", f"{prefix}3"),
    }


def weight_and_bias(ours: str, theirs: str) -> HfNames:
    """Both of a linear layer, a convolution or a norm."""
    return {f"{ours}.{kind}": HfTensors((f"{theirs}.{kind}",)) for kind in ("weight", "bias")}


def qkv(ours: str, theirs: Sequence[str], heads: int, groups: int) -> HfNames:
    """The joint projection of layer ``ours`` from three, named ``theirs``."""
    return {
        f"{ours}self_attention.linear_qkv.{kind}": HfTensors(
            tuple(f"{name}.{kind}" for name in theirs),
            partial(_interleave, groups=groups),
            partial(_separate, heads=heads, groups=groups),
        )
        for kind in ("weight", "bias")
    }


def reshaped(name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> HfTensors:
    """One tensor that has the same numbers in another shape here."""
    return HfTensors((name,), partial(_take_shape, shape=ours), partial(_give_shape, shape=theirs))


def adapter_sources(sources: HfNames, lora: LoraSettings) -> HfNames:
    """PEFT's names of the adapters that ``lora`` gives the layers of ``sources``, without what its classes put before
    them: ``<layer>.lora_A.weight`` [rank, inputs] and ``<layer>.lora_B.weight`` [outputs, rank]."""
    found: HfNames = {}
    for ours, source in sources.items():
        owner = ours.removesuffix(".weight")
        layer = layer_name(owner) if ours.endswith(".weight") else None
        if layer is None or not lora.wants(layer):
            continue
        owners = [name.removesuffix(".weight") for name in source.names]
        down, up = (tuple(f"{name}.lora_{letter}.weight" for name in owners) for letter in "AB")
        found[f"{owner}.lora_a"] = HfTensors(down, _one_below_the_other, partial(torch.chunk, chunks=len(owners)))
        found[f"{owner}.lora_b"] = HfTensors(up, source.join, source.split)  # rows like the weight's
    return found


def prefixes(names: Iterable[str], ending: str) -> list[str]:
    """What stands before ``ending`` in every name that ends so."""
    return [name.removesuffix(ending) for name in names if name == ending or name.endswith(f".{ending}")]


def count(names: Iterable[str], prefix: str) -> int:
    """Things that are numbered from 0 behind ``prefix``, e.g. layers."""
    return 1 + max((int(n[len(prefix) :].split(".")[0]) for n in names if n.startswith(prefix)), default=-1)


def unlike(config: Any, default: Any) -> dict[str, Any]:
    """Those numbers of a config that are not the default's, as recipes and presets write it."""
    standard = asdict(default)
    return {name: value for name, value in asdict(config).items() if value != standard[name]}


def interpolate(positions: Tensor, side: int) -> Tensor:
    """Position embeddings [n*n, channels] on a grid of ``side`` x ``side``, bicubic."""
    old = math.isqrt(len(positions))
    grid = positions.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    new = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return new.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)


def _one_below_the_other(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors))


def _interleave(tensors: Sequence[Tensor], groups: int) -> Tensor:
    """Q, K, V [heads * d, ...] -> one matrix ordered by group: its query heads, its key head, its value head."""
    return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)


def _separate(tensor: Tensor, heads: int, groups: int) -> Sequence[Tensor]:
    """The inverse of ``_interleave``."""
    queries = heads // groups
    grouped = tensor.unflatten(0, (groups, queries + 2, -1))
    return grouped[:, :queries].flatten(0, 2), grouped[:, queries].flatten(0, 1), grouped[:, queries + 1].flatten(0, 1)


def _halves(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.chunk(2)


def _take_shape(tensors: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    (tensor,) = tensors
    return tensor.reshape(shape)


def _give_shape(tensor: Tensor, shape: tuple[int, ...]) -> Sequence[Tensor]:
    return (tensor.reshape(shape),)


def _trim_rows(table: Tensor, rows: int) -> Sequence[Tensor]:
    return (table[:rows],)


def _pad_rows(tensors: Sequence[Tensor], rows: int, expected: int) -> Tensor:
    (table,) = tensors
    if len(table) != expected:
        raise ValueError(f"the vocabulary has {expected} tokens, the checkpoint {len(table)}")
    return F.pad(table, (0, 0, 0, rows - len(table)))
