"""A vision transformer as Megatron TransformerBlock with tensor parallelism, from pixels to one token per patch."""

from collections.abc import Callable

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_eagle.model.build_context import BuildContext, transformer_config
from megatron_eagle.model.specs import block_spec
from megatron_eagle.model.vit.config import SHUFFLE, VitConfig


class Vit(MegatronModule):
    """Pre-norm layers over patches with learned positions, and a LayerNorm behind the last one.

    residual: what stands for Megatron's sum of a sublayer's output and its input, or None.
    """

    def __init__(
        self,
        vit: VitConfig,
        build: BuildContext,
        *,
        activation: Callable[[Tensor], Tensor],
        residual: ModuleSpec | None = None,
    ) -> None:
        config = transformer_config(
            build,
            in_pipeline=False,
            num_layers=vit.num_hidden_layers,
            hidden_size=vit.hidden_size,
            ffn_hidden_size=vit.intermediate_size,
            num_attention_heads=vit.num_attention_heads,
            normalization="LayerNorm",
            layernorm_epsilon=vit.layer_norm_eps,
            add_bias_linear=True,
            add_qkv_bias=True,
            activation_func=activation,
        )
        super().__init__(config=config)
        self.tp_group = build.groups.tp
        self.grid = (vit.patches_per_side, vit.patches_per_side)
        width, patch = vit.hidden_size, vit.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, dtype=build.dtype)
        self.position_embedding = nn.Parameter(torch.empty(vit.tokens, width, dtype=build.dtype))
        spec = block_spec(
            build.transformer_impl,
            layers=vit.num_hidden_layers,
            rms_norm=False,
            mask=AttnMaskType.no_mask,
            residual=residual,
        )
        self.transformer = TransformerBlock(config, spec, pg_collection=build.groups)

    def embed(self, pixels: Tensor) -> Tensor:
        """Patches of normalised pixels [n, 3, image_size, image_size] as tokens [n, patches, hidden_size]."""
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2)

    def transform(self, tokens: Tensor) -> Tensor:
        """All layers and the last norm, [n, tokens, hidden_size] -> the same."""
        return self.transformer(tokens.transpose(0, 1).contiguous(), attention_mask=None).transpose(0, 1)


def pixel_shuffle(features: Tensor) -> Tensor:
    """[n, rows, columns, c] -> [n, rows/2, columns/2, 4c]: each 2x2 square of tokens becomes one, row by row."""
    n, rows, columns, channels = features.shape
    squares = features.view(n, rows // SHUFFLE, SHUFFLE, columns // SHUFFLE, SHUFFLE, channels)
    joined = squares.transpose(2, 3)
    return joined.reshape(n, rows // SHUFFLE, columns // SHUFFLE, SHUFFLE**2 * channels)
