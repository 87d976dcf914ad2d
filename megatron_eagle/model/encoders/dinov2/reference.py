"""transformers' Dinov2Model, and the pixels and the shuffle around it."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, PreTrainedConfig
from transformers.models.dinov2 import modeling_dinov2

from megatron_eagle.model.encoders.dinov2.config import Config
from megatron_eagle.model.vit.reference import normalised, reduced_vit, shuffled, with_sizes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Older releases of transformers (5.17) hold the projections under the names of the files.
_RENAMES = not hasattr(modeling_dinov2, "Dinov2SelfAttention")
_LOADED = (
    (r"\.attention\.attention\.(query|key|value)\.", lambda match: f".attention.{match[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)


def build(config: Config) -> nn.Module:
    """The model without the token that stands for masked patches."""
    return Dinov2Model(
        Dinov2Config(
            hidden_size=config.hidden_size,
            mlp_ratio=config.intermediate_size // config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            layer_norm_eps=config.layer_norm_eps,
            layerscale_value=config.layerscale_value,
            use_mask_token=False,
        )
    )


def build_published(config: Config, folder: Path) -> nn.Module:
    """The same with the Dinov2Config of a folder: its own, or a mixture's."""
    vision = PreTrainedConfig.get_config_dict(folder)[0].get("vision_config") or {}
    in_mixture = vision.get("dinov2_vision_config")
    said = Dinov2Config.from_dict(in_mixture) if in_mixture else Dinov2Config.from_pretrained(folder)
    return Dinov2Model(
        with_sizes(said, config, {"use_mask_token": False, "mlp_ratio": config.intermediate_size // config.hidden_size})
    )


def features(config: Config, module: nn.Module, pixels: Tensor) -> Tensor:
    """The patches' last hidden state, shuffled."""
    return shuffled(module(normalised(pixels, MEAN, STD)).last_hidden_state[:, 1:])


def reference_name(name: str) -> str:
    """The name that transformers gives a tensor of a checkpoint when it loads it."""
    for pattern, replacement in _LOADED if _RENAMES else ():
        name = re.sub(pattern, replacement, name)
    return name


def reduced(settings: dict[str, Any]) -> dict[str, Any]:
    """Two layers, eight channels a head."""
    return reduced_vit(settings, Config.num_attention_heads)
