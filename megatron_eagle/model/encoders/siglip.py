"""SigLIP: the vision transformer of Eagle 2 and 2.5, as Megatron TransformerBlock with tensor parallelism.

Numbers default to so400m at 448 pixels (paligemma-3b-pt-448's tower). The feature is the last hidden state after
``post_layernorm``; the pooling head is not part of it. PixelShuffle then joins each 2x2 square of tokens into one token
of four times the channels (``ps_version: v2`` of the released Eagle 2 models).
"""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from megatron_eagle.config.layout import STRICT, Positive
from megatron_eagle.config.model import divides
from megatron_eagle.model.build_context import BuildContext, transformer_config
from megatron_eagle.model.specs import block_spec

SHUFFLE = 2  # side of the square of tokens that PixelShuffle joins


@dataclass(frozen=True, config=STRICT)
class Config:
    """Names of transformers' SiglipVisionConfig."""

    hidden_size: Positive = 1152
    intermediate_size: Positive = 4304
    num_hidden_layers: Positive = 27
    num_attention_heads: Positive = 16
    image_size: Positive = 448
    patch_size: Positive = 14
    layer_norm_eps: float = 1e-6

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
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def output_tokens(self) -> int:
        return (self.patches_per_side // SHUFFLE) ** 2

    @property
    def output_channels(self) -> int:
        return self.hidden_size * SHUFFLE**2

    def check_tile_size(self, tile_size: int) -> None:
        if tile_size != self.image_size:
            raise ValueError(
                f"siglip sees tiles as they are: image_size={self.image_size} is not tile_size={tile_size}"
            )

    def check_tensor_parallel(self, tp: int) -> None:
        divides(tp, self.num_attention_heads, "attention heads of siglip")
        divides(tp, self.intermediate_size, "channels of siglip's intermediate_size")


class Encoder(MegatronModule):
    """uint8 tiles [n, 3, image_size, image_size] -> [n, output_tokens, output_channels]."""

    def __init__(self, siglip: Config, build: BuildContext) -> None:
        config = transformer_config(
            build,
            in_pipeline=False,
            num_layers=siglip.num_hidden_layers,
            hidden_size=siglip.hidden_size,
            ffn_hidden_size=siglip.intermediate_size,
            num_attention_heads=siglip.num_attention_heads,
            normalization="LayerNorm",
            layernorm_epsilon=siglip.layer_norm_eps,
            add_bias_linear=True,
            add_qkv_bias=True,
            activation_func=partial(F.gelu, approximate="tanh"),
        )
        super().__init__(config=config)
        self.tp_group = build.groups.tp
        self.patches_per_side = siglip.patches_per_side
        width, patch = siglip.hidden_size, siglip.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, dtype=build.dtype)
        self.position_embedding = nn.Parameter(torch.empty(siglip.patches_per_side**2, width, dtype=build.dtype))
        spec = block_spec(
            build.transformer_impl, layers=siglip.num_hidden_layers, rms_norm=False, mask=AttnMaskType.no_mask
        )
        self.transformer = TransformerBlock(config, spec, pg_collection=build.groups)

    def forward(self, tiles: Tensor) -> Tensor:
        features = self.hidden_states(normalise(tiles).to(self.patch_embedding.weight.dtype))
        return pixel_shuffle(features.unflatten(1, (self.patches_per_side, self.patches_per_side))).flatten(1, 2)

    def hidden_states(self, pixels: Tensor) -> Tensor:
        """The last hidden state after ``post_layernorm``, one token per patch: [n, patches, hidden_size].

        pixels: normalised, [n, 3, image_size, image_size] in the dtype of the weights.
        """
        patches = self.patch_embedding(pixels)
        tokens = patches.flatten(2).transpose(1, 2) + self.position_embedding
        return self.transformer(tokens.transpose(0, 1).contiguous(), attention_mask=None).transpose(0, 1)


def normalise(tiles: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: scaled to [0, 1], mean 0.5, standard deviation 0.5 (SigLIP's image processor)."""
    return tiles.float() / 127.5 - 1.0


def pixel_shuffle(features: Tensor) -> Tensor:
    """[n, rows, columns, c] -> [n, rows/2, columns/2, 4c]: each 2x2 square of tokens becomes one, row by row."""
    n, rows, columns, channels = features.shape
    squares = features.view(n, rows // SHUFFLE, SHUFFLE, columns // SHUFFLE, SHUFFLE, channels)
    joined = squares.transpose(2, 3)
    return joined.reshape(n, rows // SHUFFLE, columns // SHUFFLE, SHUFFLE**2 * channels)
