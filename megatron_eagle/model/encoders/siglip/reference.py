"""transformers' SiglipVisionModel, and the pixels and the shuffle around it."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, SiglipVisionConfig, SiglipVisionModel

from megatron_eagle.model.encoders.siglip.config import Config
from megatron_eagle.model.vit.reference import normalised, reduced_vit, shuffled, with_sizes

MEAN = STD = (0.5, 0.5, 0.5)


def build(config: Config) -> nn.Module:
    """The model without its pooling head."""
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            layer_norm_eps=config.layer_norm_eps,
            vision_use_head=False,
        )
    )


def build_published(config: Config, folder: Path) -> nn.Module:
    """The same with a folder's SiglipVisionConfig: its own, a contrastive model's ``vision_config``, a mixture's."""
    vision = PreTrainedConfig.get_config_dict(folder)[0].get("vision_config") or {}
    in_mixture = vision.get("siglip_vision_config")
    said = SiglipVisionConfig.from_dict(in_mixture) if in_mixture else SiglipVisionConfig.from_pretrained(folder)
    return SiglipVisionModel(
        with_sizes(said, config, {"vision_use_head": False, "intermediate_size": config.intermediate_size})
    )


def features(config: Config, module: nn.Module, pixels: Tensor) -> Tensor:
    """The last hidden state, shuffled."""
    return shuffled(module(normalised(pixels, MEAN, STD)).last_hidden_state)


def reference_name(name: str) -> str:
    """Released models have transformers' names."""
    return name


def reduced(settings: dict[str, Any]) -> dict[str, Any]:
    """Two layers, eight channels a head."""
    return reduced_vit(settings, Config.num_attention_heads)
