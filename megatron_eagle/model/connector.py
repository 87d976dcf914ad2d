"""The connector: turns what the encoders saw into embeddings of the language model.

LayerNorm - Linear - GELU - Linear, the ``mlp1`` of the released Eagle 2 models. The first linear layer is split over
the tensor-parallel processes by its outputs, the second by its inputs: one sum at the end is all they exchange.
"""

import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_eagle.model.build_context import BuildContext, no_init, parallel_config
from megatron_eagle.model.norm import LayerNorm


class Connector(MegatronModule):
    """[n, tokens, input_channels] -> [n, tokens, hidden_size]."""

    def __init__(self, input_channels: int, hidden_size: int, *, eps: float, build: BuildContext) -> None:
        config = parallel_config(build)
        super().__init__(config=config)
        self.tp_group = build.groups.tp
        parallel = {"config": config, "init_method": no_init, "tp_group": build.groups.tp}
        self.norm = LayerNorm(config, input_channels, eps)
        self.linear_fc1 = ColumnParallelLinear(input_channels, hidden_size, **parallel)
        self.linear_fc2 = RowParallelLinear(
            hidden_size, hidden_size, bias=True, input_is_parallel=True, skip_bias_add=False, **parallel
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.project(self.norm(features))

    def project(self, normalised: Tensor) -> Tensor:
        """What follows the norm, for features that were normalised while they were joined."""
        hidden, _ = self.linear_fc1(normalised)
        return self.linear_fc2(F.gelu(hidden))[0]
