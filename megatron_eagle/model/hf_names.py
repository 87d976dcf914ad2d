"""Which Hugging Face tensors make up which of our parameters: the only place that knows both names.

``HfTensors`` says, for one parameter of the undivided model, the names in a Hugging Face state dict, how their tensors
become one, and how that one is taken apart again. ``load`` fills a model from such a state dict, in any layout. Names
are those of transformers' Qwen2ForCausalLM, SiglipVisionModel and ConvNextModel, of timm's ConvNeXt, and ``mlp1`` of
the released Eagle 2 models; ``prefix`` is put before them for checkpoints that hold several models.

Megatron's own arrangements: Q, K and V are one matrix, grouped by key/value head (the group's query heads, its key
head, its value head); gate and up projection are one matrix, gate first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_eagle.config.model import QwenConfig
from megatron_eagle.errors import UserError
from megatron_eagle.model.encoders import convnext, siglip
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
        sources |= _qkv(ours, theirs, config.num_attention_heads, config.num_key_value_heads)
        sources |= {
            f"{ours}input_layernorm.weight": HfTensors((f"{theirs}input_layernorm.weight",)),
            f"{ours}self_attention.linear_proj.weight": HfTensors((f"{theirs}self_attn.o_proj.weight",)),
            f"{ours}pre_mlp_layernorm.weight": HfTensors((f"{theirs}post_attention_layernorm.weight",)),
            f"{ours}mlp.linear_fc1.weight": HfTensors(
                (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"), _gate_and_up, _halves
            ),
            f"{ours}mlp.linear_fc2.weight": HfTensors((f"{theirs}mlp.down_proj.weight",)),
        }
    return sources


def siglip_sources(config: siglip.Config, prefix: str = "", encoder: str = "siglip") -> HfNames:
    """SiglipVisionModel without its pooling head -> ``vision.<encoder>``."""
    start = f"vision.{encoder}."
    sources = _weight_and_bias(f"{start}patch_embedding", f"{prefix}embeddings.patch_embedding")
    sources[f"{start}position_embedding"] = HfTensors((f"{prefix}embeddings.position_embedding.weight",))
    for number in range(config.num_hidden_layers):
        ours, theirs = f"{start}transformer.layers.{number}.", f"{prefix}encoder.layers.{number}."
        sources |= _qkv(ours, theirs, config.num_attention_heads, config.num_attention_heads)
        for our_name, their_name in {
            "input_layernorm": "layer_norm1",
            "self_attention.linear_proj": "self_attn.out_proj",
            "pre_mlp_layernorm": "layer_norm2",
            "mlp.linear_fc1": "mlp.fc1",
            "mlp.linear_fc2": "mlp.fc2",
        }.items():
            sources |= _weight_and_bias(ours + our_name, theirs + their_name)
    return sources | _weight_and_bias(f"{start}transformer.final_layernorm", f"{prefix}post_layernorm")


@dataclass(frozen=True)
class _ConvNextNames:
    """How somebody else's ConvNeXt calls its parts; {stage} and {block} count from 0."""

    stem: str
    stem_norm: str
    shrink_norm: str
    shrink: str
    block: str
    depthwise: str
    norm: str
    fc1: str
    fc2: str
    scale: str


_TRANSFORMERS = _ConvNextNames(
    stem="embeddings.patch_embeddings",
    stem_norm="embeddings.layernorm",
    shrink_norm="encoder.stages.{stage}.downsampling_layer.0",
    shrink="encoder.stages.{stage}.downsampling_layer.1",
    block="encoder.stages.{stage}.layers.{block}.",
    depthwise="dwconv",
    norm="layernorm",
    fc1="pwconv1",
    fc2="pwconv2",
    scale="layer_scale_parameter",
)
_TIMM = _ConvNextNames(
    stem="stem.0",
    stem_norm="stem.1",
    shrink_norm="stages.{stage}.downsample.0",
    shrink="stages.{stage}.downsample.1",
    block="stages.{stage}.blocks.{block}.",
    depthwise="conv_dw",
    norm="norm",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    scale="gamma",
)


def convnext_sources(config: convnext.Config, prefix: str = "", encoder: str = "convnext") -> HfNames:
    """transformers' ConvNextModel without its last norm -> ``vision.<encoder>``."""
    return _convnext_sources(config, prefix, encoder, _TRANSFORMERS)


def timm_convnext_sources(
    config: convnext.Config, prefix: str = "", encoder: str = "convnext", layer_scale: str = "gamma"
) -> HfNames:
    """timm's ConvNeXt without its head -> ``vision.<encoder>``.

    layer_scale: name of a block's scale; timm and open_clip have ``gamma``, the released Eagle 2 models ``weight``,
    because transformers renames tensors called gamma when it loads them.
    """
    return _convnext_sources(config, prefix, encoder, replace(_TIMM, scale=layer_scale))


def _convnext_sources(config: convnext.Config, prefix: str, encoder: str, names: _ConvNextNames) -> HfNames:
    start = f"vision.{encoder}."
    sources = _weight_and_bias(f"{start}stem", prefix + names.stem)
    sources |= _weight_and_bias(f"{start}stem_norm", prefix + names.stem_norm)
    for stage, depth in enumerate(config.depths):
        before = 1 if stage else 0  # our stages count the shrinking layer in front of their blocks
        ours = f"{start}stages.{stage}."
        if before:
            sources |= _weight_and_bias(f"{ours}0.norm", prefix + names.shrink_norm.format(stage=stage))
            sources |= _weight_and_bias(f"{ours}0.conv", prefix + names.shrink.format(stage=stage))
        for block in range(depth):
            our_block, theirs = f"{ours}{before + block}.", prefix + names.block.format(stage=stage, block=block)
            sources |= _weight_and_bias(f"{our_block}depthwise", theirs + names.depthwise)
            sources |= _weight_and_bias(f"{our_block}norm", theirs + names.norm)
            sources |= _weight_and_bias(f"{our_block}linear_fc1", theirs + names.fc1)
            sources |= _weight_and_bias(f"{our_block}linear_fc2", theirs + names.fc2)
            sources[f"{our_block}layer_scale"] = HfTensors((theirs + names.scale,))
    return sources


def connector_sources(prefix: str = "mlp1.") -> HfNames:
    """The Sequential(LayerNorm, Linear, GELU, Linear) of Eagle2ChatModel -> ``connector``."""
    return {
        **_weight_and_bias("connector.norm", f"{prefix}0"),
        **_weight_and_bias("connector.linear_fc1", f"{prefix}1"),
        **_weight_and_bias("connector.linear_fc2", f"{prefix}3"),
    }


def _weight_and_bias(ours: str, theirs: str) -> HfNames:
    return {f"{ours}.{kind}": HfTensors((f"{theirs}.{kind}",)) for kind in ("weight", "bias")}


def _qkv(ours: str, theirs: str, heads: int, groups: int) -> HfNames:
    return {
        f"{ours}self_attention.linear_qkv.{kind}": HfTensors(
            tuple(f"{theirs}self_attn.{letter}_proj.{kind}" for letter in "qkv"),
            partial(_interleave, groups=groups),
            partial(_separate, heads=heads, groups=groups),
        )
        for kind in ("weight", "bias")
    }


def _gate_and_up(tensors: Sequence[Tensor]) -> Tensor:
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


def _trim_rows(table: Tensor, rows: int) -> Sequence[Tensor]:
    return (table[:rows],)


def _pad_rows(tensors: Sequence[Tensor], rows: int, expected: int) -> Tensor:
    (table,) = tensors
    if len(table) != expected:
        raise ValueError(f"the vocabulary has {expected} tokens, the checkpoint {len(table)}")
    return F.pad(table, (0, 0, 0, rows - len(table)))
