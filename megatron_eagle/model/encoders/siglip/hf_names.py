"""SigLIP's names: transformers' SiglipVisionModel, in released Eagle models as in checkpoints of its own."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.model.encoders.siglip.config import Config
from megatron_eagle.model.hf_config import read_part
from megatron_eagle.model.hf_names import (
    Changes,
    HfNames,
    HfTensors,
    Infos,
    count,
    prefixes,
    qkv,
    unlike,
    weight_and_bias,
)
from megatron_eagle.model.vit.hf_names import fit_positions

TOWER = "vision_model."
ALONE = "vision_model.vision_model."
VISION_PATH = "palisiglip"
ORDER = 0  # Eagle puts it first among the channels, whatever its number among the towers
MIXTURE_KEYS = ("siglip_vision_config",)
UNUSED = ((r"^head\.", "the pooling head: Eagle takes the features before it"),)
_PATCHES, _POSITIONS = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
# Heads of the published ones, by width: so400m, large and base; a file of weights alone does not say it.
_HEADS = {1152: 16, 1024: 16, 768: 12}
# PaliGemma has its projector's numbers here, Eagle a rate of dropped paths that transformers' SigLIP does not read.
_HARMLESS = ("vision_use_head", "num_image_tokens", "projection_dim", "projector_hidden_act", "drop_path_rate")
_LAYER = {
    "input_layernorm": "layer_norm1",
    "self_attention.linear_proj": "self_attn.out_proj",
    "pre_mlp_layernorm": "layer_norm2",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
}


def find(names: Collection[str]) -> list[str]:
    """Prefixes of SigLIPs; what has a class embedding beside its patches is a CLIP."""
    return [prefix for prefix in prefixes(names, _PATCHES) if f"{prefix}embeddings.class_embedding" not in names]


def describe(infos: Infos, prefix: str, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Shapes say all but the number of heads and the epsilon."""
    patch = infos[f"{prefix}{_PATCHES}"]
    if len(patch.shape) != 4:
        raise UserError(f"{prefix}{_PATCHES} is {patch}; SigLIP of a fixed size has four dimensions (not NaFlex)")
    positions = infos[f"{prefix}{_POSITIONS}"].shape[0]
    sizes = {
        "hidden_size": patch.shape[0],
        "intermediate_size": infos[f"{prefix}encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(infos, f"{prefix}encoder.layers."),
        "image_size": math.isqrt(positions) * patch.shape[-1],
        "patch_size": patch.shape[-1],
    }
    heads, eps = _unshaped(sizes, prefix, config)
    return unlike(Config(**sizes, num_attention_heads=heads, layer_norm_eps=eps), Config())


def _unshaped(sizes: dict[str, int], prefix: str, config: Mapping[str, Any] | None) -> tuple[int, float]:
    """Heads and epsilon: as transformers reads ``config``, or those of the published model of this width."""
    from transformers import SiglipVisionConfig

    width = sizes["hidden_size"]
    if config is None:
        if width not in _HEADS:
            raise UserError(
                f"nothing says how many attention heads the SigLIP at {prefix!r} has: hidden_size={width} is none of "
                f"the published {', '.join(map(str, _HEADS))}; put its config.json, with num_attention_heads, beside it"
            )
        return _HEADS[width], Config.layer_norm_eps
    said = config.get("siglip_vision_config") or config
    read = ("num_attention_heads", "layer_norm_eps")
    kinds = ("siglip_vision_model", "siglip")
    where = f"the config of the SigLIP at {prefix!r}"
    numbers = read_part(said, SiglipVisionConfig, where, model_types=kinds, read=read, harmless=_HARMLESS, sizes=sizes)
    heads, eps = numbers.num_attention_heads, numbers.layer_norm_eps
    if "num_attention_heads" not in said and heads != _HEADS.get(width, heads):
        raise UserError(
            f"{where} leaves out num_attention_heads, for which transformers takes {heads}; published SigLIPs of "
            f"hidden_size={width} have {_HEADS[width]}: write it into config.json"
        )
    if width % heads:
        raise UserError(f"{where} has num_attention_heads={heads}, which do not divide hidden_size={width}")
    return heads, eps


def released_sources(config: Config, prefix: str, name: str, *, layer_scale: str) -> HfNames:
    """Released models have transformers' names."""
    return reference_sources(config, prefix, name)


def reference_sources(config: Config, prefix: str, name: str) -> HfNames:
    """SiglipVisionModel without its pooling head -> ``vision.<name>``."""
    start = f"vision.{name}."
    sources = weight_and_bias(f"{start}patch_embedding", f"{prefix}embeddings.patch_embedding")
    sources[f"{start}position_embedding"] = HfTensors((f"{prefix}{_POSITIONS}",))
    for number in range(config.num_hidden_layers):
        ours, theirs = f"{start}transformer.layers.{number}.", f"{prefix}encoder.layers.{number}."
        letters = tuple(f"{theirs}self_attn.{letter}_proj" for letter in "qkv")
        sources |= qkv(ours, letters, config.num_attention_heads, config.num_attention_heads)
        for our_name, their_name in _LAYER.items():
            sources |= weight_and_bias(ours + our_name, theirs + their_name)
    return sources | weight_and_bias(f"{start}transformer.final_layernorm", f"{prefix}post_layernorm")


def exported(config: Config, dtype: str) -> dict[str, Any]:
    """SigLIP's own config, and the side of its grid of patches.

    Without ``vision_use_head: false`` transformers makes a pooling head, for which the checkpoint has no weights;
    NVIDIA's code draws with ``initializer_range``, which transformers' config has no default for.
    """
    numbers = {**asdict(config), "hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "torch_dtype": dtype}
    numbers |= {"vision_use_head": False, "initializer_range": 0.02}
    own = {"model_type": "siglip_vision_model", **numbers}
    return {"siglip_vision_config": own, "grid_size": config.patches_per_side}


def image_size(config: Config) -> int:
    """Side of the pixels it sees."""
    return config.image_size


def fit(infos: Infos, prefix: str, settings: dict[str, Any], tile_size: int) -> tuple[dict[str, Any], Changes]:
    """Positions are interpolated if the grid of patches changes."""
    return fit_positions(infos, prefix + _PATCHES, prefix + _POSITIONS, settings, tile_size, Config())
