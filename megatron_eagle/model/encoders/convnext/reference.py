"""transformers' ConvNextModel with timm's epsilon and without its last norm, and the resize in front of it."""

import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel

from megatron_eagle.model.encoders.convnext.config import Config

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# timm's names -> transformers' ConvNextModel.
_TIMM = (
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"encoder.stages.\1.layers.\2.dwconv."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.norm\.", r"encoder.stages.\1.layers.\2.layernorm."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"encoder.stages.\1.layers.\2.pwconv\3."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.(gamma|weight)$", r"encoder.stages.\1.layers.\2.layer_scale_parameter"),
)


def build(config: Config) -> nn.Module:
    """The norm after the last stage belongs to CLIP's head and is not used."""
    model = ConvNextModel(ConvNextConfig(depths=list(config.depths), hidden_sizes=list(config.hidden_sizes)))
    model.layernorm = nn.Identity()
    for module in model.modules():
        if "LayerNorm" in type(module).__name__:
            module.eps = config.layer_norm_eps  # transformers has 1e-6 fixed, timm's CLIP models 1e-5
    return model


def features(config: Config, module: nn.Module, pixels: Tensor) -> Tensor:
    """The last stage's map, row by row."""
    size = (config.image_size, config.image_size)
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=True)
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return module((pixels - mean) / std).last_hidden_state.flatten(2).transpose(1, 2)


def reference_name(name: str) -> str:
    """transformers' name of timm's ``name``."""
    for pattern, replacement in _TIMM:
        name = re.sub(pattern, replacement, name)
    return name


def reduced(settings: dict[str, Any]) -> dict[str, Any]:
    """One narrow block a stage."""
    return settings | {"depths": (1, 1, 1, 1), "hidden_sizes": (16, 16, 16, 16), "layer_scale_init_value": 0.5}
