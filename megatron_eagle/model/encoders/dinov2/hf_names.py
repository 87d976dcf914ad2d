"""DINOv2's names: those of the published checkpoints, and those that transformers' Dinov2Model has in memory.

No released Eagle holds one. Ours are written as a tower of a mixture, and ``dinov2_vision_config`` beside
``siglip_vision_config`` says what shapes do not.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.model.encoders.dinov2.config import Config
from megatron_eagle.model.hf_config import read_part
from megatron_eagle.model.hf_names import (
    Changes,
    HfNames,
    HfTensors,
    Infos,
    count,
    prefixes,
    qkv,
    reshaped,
    unlike,
    weight_and_bias,
)
from megatron_eagle.model.vit.hf_names import fit_positions

TOWER = ""
ALONE = None
VISION_PATH = None
ORDER = 2
MIXTURE_KEYS = ("dinov2_vision_config",)
UNUSED = ((r"^embeddings\.mask_token$", "stands for masked patches, in DINOv2's own training only"),)
_PATCHES, _POSITIONS = "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"
_LAYER = {
    "input_layernorm": "norm1",
    "pre_mlp_layernorm": "norm2",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
}
# Query, key, value and output projection, in files and in memory.
_IN_FILES = ("attention.query", "attention.key", "attention.value", "output.dense")
_IN_MEMORY = ("q_proj", "k_proj", "v_proj", "o_proj")
# Keys of an exported config that change what it computes; no other value is understood.
_FIXED = {"hidden_act": "gelu", "qkv_bias": True, "use_swiglu_ffn": False, "num_channels": 3}

# What fresh models start with, and what a backbone for detection gives out.
_HARMLESS = (
    *("layerscale_value", "use_mask_token", "stage_names", "out_features", "out_indices"),
    *("apply_layernorm", "reshape_hidden_states"),
)


def find(names: Collection[str]) -> list[str]:
    """Prefixes of DINOv2s; other vision transformers have a convolution of this name, none has the scales."""
    return [p for p in prefixes(names, _PATCHES) if f"{p}encoder.layer.0.layer_scale1.lambda1" in names]


def describe(infos: Infos, prefix: str, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Shapes say all but the number of heads and the epsilon, which take a config.json."""
    from transformers import Dinov2Config

    if f"{prefix}embeddings.register_tokens" in infos:
        raise UserError(f"{prefix}embeddings.register_tokens: a DINOv2 with registers is not supported")
    if config is None:
        raise UserError(
            f"nothing says how many attention heads the DINOv2 at {prefix!r} has; put its config.json beside it"
        )
    said = config.get("dinov2_vision_config") or config
    patch = infos[f"{prefix}{_PATCHES}"].shape
    sizes = {
        "hidden_size": patch[0],
        "num_hidden_layers": count(infos, f"{prefix}encoder.layer."),
        "image_size": math.isqrt(infos[f"{prefix}{_POSITIONS}"].shape[1] - 1) * patch[-1],
        "patch_size": patch[-1],
    }
    inner = infos[f"{prefix}encoder.layer.0.mlp.fc1.weight"].shape[0]
    numbers = read_part(
        said,
        Dinov2Config,
        f"the config of the DINOv2 at {prefix!r}",
        model_types=("dinov2",),
        read=("num_attention_heads", "layer_norm_eps"),
        harmless=_HARMLESS,
        sizes={**sizes, "intermediate_size": inner, "mlp_ratio": inner // patch[0]},
    )
    found = Config(
        **sizes,
        intermediate_size=inner,
        num_attention_heads=numbers.num_attention_heads,
        layer_norm_eps=numbers.layer_norm_eps,
    )
    return unlike(found, Config())


def released_sources(config: Config, prefix: str, name: str, *, layer_scale: str) -> HfNames:
    """A published checkpoint -> ``vision.<name>``; it calls the scales ``lambda1``."""
    return _sources(config, prefix, name, _IN_FILES)


def reference_sources(config: Config, prefix: str, name: str) -> HfNames:
    """Dinov2Model -> ``vision.<name>``. Older releases of transformers (5.17) hold the projections as files do."""
    from transformers.models.dinov2 import modeling_dinov2

    as_files = hasattr(modeling_dinov2, "Dinov2SelfAttention")
    return _sources(config, prefix, name, _IN_FILES if as_files else _IN_MEMORY)


def _sources(config: Config, prefix: str, name: str, projections: Sequence[str]) -> HfNames:
    start, width = f"vision.{name}.", config.hidden_size
    sources = weight_and_bias(f"{start}patch_embedding", f"{prefix}embeddings.patch_embeddings.projection")
    sources[f"{start}class_token"] = reshaped(f"{prefix}embeddings.cls_token", (1, width), (1, 1, width))
    positions = (config.tokens, width)
    sources[f"{start}position_embedding"] = reshaped(f"{prefix}{_POSITIONS}", positions, (1, *positions))
    for number in range(config.num_hidden_layers):
        ours, theirs = f"{start}transformer.layers.{number}.", f"{prefix}encoder.layer.{number}."
        *parts, out = (f"{theirs}attention.{projection}" for projection in projections)
        sources |= qkv(ours, parts, config.num_attention_heads, config.num_attention_heads)
        sources |= weight_and_bias(f"{ours}self_attention.linear_proj", out)
        for our_name, their_name in _LAYER.items():
            sources |= weight_and_bias(ours + our_name, theirs + their_name)
        sources[f"{ours}self_attn_bda.scale"] = HfTensors((f"{theirs}layer_scale1.lambda1",))
        sources[f"{ours}mlp_bda.scale"] = HfTensors((f"{theirs}layer_scale2.lambda1",))
    return sources | weight_and_bias(f"{start}transformer.final_layernorm", f"{prefix}layernorm")


def exported(config: Config, dtype: str) -> dict[str, Any]:
    """DINOv2's own config."""
    ratio = config.intermediate_size // config.hidden_size
    numbers = {"model_type": "dinov2", **asdict(config), "mlp_ratio": ratio, **_FIXED, "torch_dtype": dtype}
    return {"dinov2_vision_config": numbers}


def image_size(config: Config) -> int:
    """Side of the pixels it sees."""
    return config.image_size


def fit(infos: Infos, prefix: str, settings: dict[str, Any], tile_size: int) -> tuple[dict[str, Any], Changes]:
    """Positions are interpolated if the grid of patches changes."""
    return fit_positions(infos, prefix + _PATCHES, prefix + _POSITIONS, settings, tile_size, Config())
