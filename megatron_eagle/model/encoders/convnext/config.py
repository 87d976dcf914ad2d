"""ConvNeXt's numbers, by default those of timm's ``convnext_xxlarge.clip_laion2b_soup``."""

import re
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_eagle.config.encoders import KernelRole
from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.model import divides
from megatron_eagle.config.numbers import Finite, NotNegative, Positive

STEM = 4  # side of the squares of pixels that the first convolution takes in
STRIDE = 32  # the stem shrinks by 4, each of the three later stages by 2
KERNEL = 7  # side of the depthwise convolution
EXPANSION = 4

FourSizes = Annotated[tuple[Positive, ...], Field(min_length=4, max_length=4)]


@dataclass(frozen=True, config=STRICT)
class Config:
    """Names of transformers' ConvNextConfig.

    depths: blocks of each of the four stages.
    hidden_sizes: channels of each stage.
    image_size: pixels a side that tiles are resized to.
    layer_norm_eps: added to the variance in norms; as in timm's CLIP models (transformers uses 1e-6).
    layer_scale_init_value: what the scales of a fresh model are.
    """

    kernel_role: ClassVar[KernelRole | None] = "appended"

    depths: FourSizes = (3, 4, 30, 3)
    hidden_sizes: FourSizes = (384, 768, 1536, 3072)
    image_size: Positive = 512
    layer_norm_eps: NotNegative = 1e-5
    layer_scale_init_value: Finite = 1e-6

    def __post_init__(self) -> None:
        if self.image_size % STRIDE:
            raise ValueError(f"image_size={self.image_size} is not a multiple of convnext's stride {STRIDE}")

    @property
    def depth(self) -> int:
        return sum(self.depths)

    def layer_of(self, name: str) -> int:
        """As ``config.layers.Layered``: blocks, counted over all stages; what shrinks the map is its next block's."""
        match = re.match(r"stages\.(\d+)\.(\d+)\.", name)
        if match is None:
            return -1
        stage, place = int(match[1]), int(match[2])
        return sum(self.depths[:stage]) + max(0, place - 1 if stage else place)

    @property
    def output_tokens(self) -> int:
        return (self.image_size // STRIDE) ** 2

    @property
    def output_channels(self) -> int:
        return self.hidden_sizes[-1]

    def check_tile_size(self, tile_size: int) -> None:
        """Any size does, tiles are resized."""

    def check_tensor_parallel(self, tp: int) -> None:
        for size in self.hidden_sizes:
            divides(tp, EXPANSION * size, f"channels inside a convnext block of {size}")
