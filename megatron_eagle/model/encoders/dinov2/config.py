"""DINOv2's numbers, by default those of facebook/dinov2-large at 448 pixels."""

from typing import ClassVar

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Finite, NotNegative, Positive
from megatron_eagle.model.vit.config import VitConfig


@dataclass(frozen=True, config=STRICT)
class Config(VitConfig):
    """Names of transformers' Dinov2Config, whose mlp_ratio is intermediate_size / hidden_size.

    layerscale_value: what the scales of a fresh model are.
    """

    kind: ClassVar[str] = "dinov2"
    class_tokens: ClassVar[int] = 1

    hidden_size: Positive = 1024
    intermediate_size: Positive = 4096
    num_hidden_layers: Positive = 24
    num_attention_heads: Positive = 16
    image_size: Positive = 448
    patch_size: Positive = 14
    layer_norm_eps: NotNegative = 1e-6
    layerscale_value: Finite = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.intermediate_size % self.hidden_size:
            raise ValueError(
                f"intermediate_size={self.intermediate_size} is not a multiple of hidden_size={self.hidden_size}"
            )
