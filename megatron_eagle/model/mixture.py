"""The mixture of vision encoders: every encoder sees every tile, their features are joined channel by channel.

The order of the encoders is the order of the channels. Joining by channel keeps the number of tokens, so all encoders
have to make the same number of them per tile.
"""

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_eagle.config.model import EagleConfig, encoder_names, kernels_take, tokens_per_tile
from megatron_eagle.model.build_context import BuildContext, parallel_config
from megatron_eagle.model.encoders import build_encoder


class Mixture(MegatronModule):
    """uint8 tiles [n, 3, s, s] -> [n, tokens_per_tile, mixture_channels].

    Each encoder is a submodule under its name (``encoder_names``).
    """

    def __init__(self, config: EagleConfig, build: BuildContext) -> None:
        super().__init__(config=parallel_config(build))
        self.tp_group = build.groups.tp
        self.joined_in_kernel = build.kernels == "triton" and kernels_take(config)
        tokens_per_tile(config)
        self.names = encoder_names(config)
        for name, settings in zip(self.names, config.encoders, strict=True):
            self.add_module(name, build_encoder(settings, build))

    def before_joining(self, tiles: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """The shuffled encoder's tokens [n, rows * columns, c1] before PixelShuffle, the appended one's
        [n, tokens, c2], and (rows, columns).

        For the kernel that joins them, where ``joined_in_kernel``; another one prepares the tiles for both encoders.
        """
        from eagle_kernels.tile_prepare import tile_prepare  # needs Triton, which a CPU may lack

        shuffled, *rest = (self.get_submodule(name) for name in self.names)
        appended = rest[0] if rest else None
        resized = appended.image_size if appended else None
        as_it_is, enlarged = tile_prepare(tiles, convnext_size=resized, dtype=self.config.params_dtype)
        behind = appended.from_pixels(enlarged) if appended else None
        return shuffled.from_pixels(as_it_is), behind, shuffled.grid

    def forward(self, tiles: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(name)(tiles) for name in self.names], dim=-1)
