"""From tiles to features: the mixture of vision encoders and the connector behind it, wherever they are hosted.

``encoder: tensor`` keeps both inside EagleModel, on the first pipeline stage. ``encoder: spread`` puts them beside it,
into a TileEncoder of which every process has a whole copy. Names, shapes and first values of the weights are the same.
"""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig, mixture_channels, tokens_per_tile
from megatron_eagle.model.build_context import (
    BuildContext,
    Kernels,
    Precision,
    Recompute,
    TransformerImpl,
    parallel_config,
)
from megatron_eagle.model.connector import Connector
from megatron_eagle.model.mixture import Mixture
from megatron_eagle.model.weights import initialise


def make_encoders(eagle: EagleConfig, build: BuildContext) -> tuple[Mixture, Connector]:
    """Vision encoders and connector with memory for their weights."""
    language = eagle.language.hidden_size
    connector = Connector(mixture_channels(eagle), language, eps=eagle.connector_layer_norm_eps, build=build)
    return Mixture(eagle, build), connector


def encode_tiles(vision: Mixture, connector: Connector, tiles: Tensor) -> Tensor:
    """uint8 tiles [n, 3, s, s] -> features [n, tokens_per_tile, hidden_size], n > 0; frozen encoders keep no graph."""
    frozen = not any(parameter.requires_grad for parameter in vision.parameters())
    graph = torch.no_grad() if frozen else contextlib.nullcontext()
    if not vision.joined_in_kernel:
        with graph:
            features = vision(tiles)
        return connector(features)
    from eagle_kernels.pixel_shuffle_concat import pixel_shuffle_concat  # needs Triton, which a CPU may lack

    with graph:
        shuffled, appended, grid = vision.before_joining(tiles)
    norm = connector.norm
    joined = pixel_shuffle_concat(shuffled, appended, grid=grid, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    return connector.project(joined.unflatten(0, (len(tiles), -1)))


class TileEncoder(MegatronModule):
    """A whole copy of the encoders and the connector; uint8 tiles [n, 3, s, s] -> [n, tokens_per_tile, hidden_size].

    copies: the processes that each hold one.
    """

    def __init__(self, eagle: EagleConfig, build: BuildContext, copies: dist.ProcessGroup) -> None:
        super().__init__(config=parallel_config(build))
        self.tp_group = build.groups.tp
        self.copies = copies
        self.dtype = build.dtype
        self.tile_shape = (3, eagle.tile_size, eagle.tile_size)
        self.feature_shape = (tokens_per_tile(eagle), eagle.language.hidden_size)
        self.vision, self.connector = make_encoders(eagle, build)

    def forward(self, tiles: Tensor) -> Tensor:
        return encode_tiles(self.vision, self.connector, tiles)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every weight under its global name; one of the copies writes."""
        return super().sharded_state_dict(prefix, sharded_offsets, {**(metadata or {}), "dp_cp_group": self.copies})


def build_tile_encoder(
    config: EagleConfig,
    *,
    self_group: dist.ProcessGroup,
    copies: dist.ProcessGroup,
    transformer_impl: TransformerImpl = "local",
    precision: Precision = "bf16",
    recompute: Recompute = "none",
    kernels: Kernels = "torch",
    device: torch.device | str = "cpu",
    seed: int | None = 0,
) -> TileEncoder:
    """Build this process's copy on ``device``.

    self_group: the group of this process by itself. seed: as in ``build_eagle``; the values are the same as there.
    """
    groups = ProcessGroupCollection(tp=self_group, pp=self_group, cp=self_group, embd=None)
    with torch.device(device):
        build = BuildContext(Layout(), groups, transformer_impl, precision, recompute, kernels)
        encoder = TileEncoder(config, build, copies)
    if seed is not None:
        initialise(encoder, self_group, seed=seed, language_std=config.language.initializer_range)
    return encoder
