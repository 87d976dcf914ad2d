"""SigLIP's numbers, by default those of so400m at 448 pixels (paligemma-3b-pt-448's tower)."""

from typing import ClassVar

from pydantic.dataclasses import dataclass

from megatron_eagle.config.encoders import KernelRole
from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import NotNegative, Positive
from megatron_eagle.model.vit.config import VitConfig


@dataclass(frozen=True, config=STRICT)
class Config(VitConfig):
    """Names of transformers' SiglipVisionConfig."""

    kind: ClassVar[str] = "siglip"
    kernel_role: ClassVar[KernelRole | None] = "shuffled"

    hidden_size: Positive = 1152
    intermediate_size: Positive = 4304
    num_hidden_layers: Positive = 27
    num_attention_heads: Positive = 16
    image_size: Positive = 448
    patch_size: Positive = 14
    layer_norm_eps: NotNegative = 1e-6
