"""The smallest encoder: the mean colour of each stripe of a tile, through one linear layer."""

from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_eagle.model.build_context import BuildContext, parallel_config
from stripes.config import Config


class Encoder(MegatronModule):
    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config=parallel_config(build))
        self.tp_group = build.groups.tp
        self.rows = config.rows
        self.linear = nn.Linear(3, config.channels, dtype=build.dtype)

    def forward(self, tiles: Tensor) -> Tensor:
        colours = tiles.float().unflatten(2, (self.rows, -1)).mean(dim=(3, 4)).transpose(1, 2) / 255
        return self.linear(colours.to(self.linear.weight.dtype))
