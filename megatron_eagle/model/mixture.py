"""The mixture of vision encoders: every encoder sees every tile, their features are joined channel by channel.

The order of the encoders is the order of the channels (Eagle 2: SigLIP, then ConvNeXt). Joining by channel keeps the
number of tokens, so all encoders have to make the same number of them per tile.
"""

from collections import Counter

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_eagle.config.model import EagleConfig
from megatron_eagle.model.build_context import BuildContext, parallel_config
from megatron_eagle.model.encoders import build_encoder, encoder_config


def tokens_per_tile(config: EagleConfig) -> int:
    """Tokens that one tile becomes in the language model; ValueError if the encoders disagree."""
    tokens = [encoder_config(settings).output_tokens for settings in config.encoders]
    if len(set(tokens)) > 1:
        counts = ", ".join(f"{s['kind']} {count}" for s, count in zip(config.encoders, tokens, strict=True))
        raise ValueError(f"encoders joined by channel must agree on the tokens per tile, got {counts}")
    return tokens[0]


def mixture_channels(config: EagleConfig) -> int:
    """Channels of a token after joining."""
    return sum(encoder_config(settings).output_channels for settings in config.encoders)


class Mixture(MegatronModule):
    """uint8 tiles [n, 3, s, s] -> [n, tokens_per_tile, mixture_channels].

    Each encoder is a submodule under the name of its kind; a kind used again gets a number (``siglip``, ``siglip_2``).
    """

    def __init__(self, config: EagleConfig, build: BuildContext) -> None:
        super().__init__(config=parallel_config(build))
        self.tp_group = build.groups.tp
        kinds = [settings["kind"] for settings in config.encoders]
        self.joined_in_kernel = build.kernels == "triton" and kinds in (["siglip"], ["siglip", "convnext"])
        tokens_per_tile(config)
        self.names: list[str] = []
        seen: Counter[str] = Counter()
        for settings in config.encoders:
            kind = settings["kind"]
            seen[kind] += 1
            self.names.append(kind if seen[kind] == 1 else f"{kind}_{seen[kind]}")
            self.add_module(self.names[-1], build_encoder(settings, build))

    def before_joining(self, tiles: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """SigLIP's tokens [n, rows * columns, c1] before PixelShuffle, ConvNeXt's [n, tokens, c2], and (rows, columns).

        For the kernel that joins them, where ``joined_in_kernel``; another one prepares the tiles for both encoders.
        """
        from eagle_kernels.tile_prepare import tile_prepare  # needs Triton, which a CPU may lack

        siglip = self.get_submodule("siglip")
        convnext = self.get_submodule("convnext") if "convnext" in self.names else None
        resized = convnext.image_size if convnext else None
        for_siglip, for_convnext = tile_prepare(tiles, convnext_size=resized, dtype=self.config.params_dtype)
        seen = convnext.features(for_convnext) if convnext else None
        return siglip.hidden_states(for_siglip), seen, (siglip.patches_per_side, siglip.patches_per_side)

    def forward(self, tiles: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(name)(tiles) for name in self.names], dim=-1)
