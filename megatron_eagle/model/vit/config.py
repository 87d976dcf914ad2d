"""Numbers of a vision transformer that sees a tile as it is and whose patches PixelShuffle joins two by two."""

import re
from typing import ClassVar

from pydantic.dataclasses import dataclass

from megatron_eagle.config.encoders import KernelRole
from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.model import divides
from megatron_eagle.config.numbers import NotNegative, Positive

SHUFFLE = 2  # side of the square of tokens that PixelShuffle joins (``ps_version: v2`` of the released models)


@dataclass(frozen=True, config=STRICT)
class VitConfig:
    """Names of transformers' configs; an encoder gives the defaults.

    hidden_size: channels of a patch.
    intermediate_size: channels inside the feed-forward block.
    num_hidden_layers: layers.
    num_attention_heads: heads of a layer.
    image_size: side of a tile in pixels, which is the recipe's tile_size.
    patch_size: side of a patch in pixels.
    layer_norm_eps: added to the variance in norms.

    ``kind`` is the encoder's, for messages; ``class_tokens`` stand in front of the patches and are dropped behind the
    last layer.
    """

    kind: ClassVar[str]
    kernel_role: ClassVar[KernelRole | None] = None
    class_tokens: ClassVar[int] = 0

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    image_size: Positive
    patch_size: Positive
    layer_norm_eps: NotNegative

    def __post_init__(self) -> None:
        if self.image_size % (SHUFFLE * self.patch_size):
            raise ValueError(
                f"image_size={self.image_size} cannot be cut into patches of {self.patch_size} pixels "
                f"and these joined by {SHUFFLE}x{SHUFFLE}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of {self.num_attention_heads} attention heads"
            )

    @property
    def depth(self) -> int:
        return self.num_hidden_layers

    def layer_of(self, name: str) -> int:
        """As ``config.layers.Layered``."""
        if match := re.match(r"transformer\.layers\.(\d+)\.", name):
            return int(match[1])
        return self.depth if name.startswith("transformer.") else -1

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.patches_per_side**2

    @property
    def tokens(self) -> int:
        """Tokens inside the transformer."""
        return self.class_tokens + self.patches

    @property
    def output_tokens(self) -> int:
        return self.patches // SHUFFLE**2

    @property
    def output_channels(self) -> int:
        return self.hidden_size * SHUFFLE**2

    def check_tile_size(self, tile_size: int) -> None:
        if tile_size != self.image_size:
            raise ValueError(
                f"{self.kind} sees tiles as they are: image_size={self.image_size} is not tile_size={tile_size}"
            )

    def check_tensor_parallel(self, tp: int) -> None:
        divides(tp, self.num_attention_heads, f"attention heads of {self.kind}")
        divides(tp, self.intermediate_size, f"channels of {self.kind}'s intermediate_size")
