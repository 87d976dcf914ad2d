"""The running mean of the weights that a stage trains (EMA): mean <- decay * mean + (1 - decay) * weight, each step.

It is kept in float32, of what the optimizer steps on: its main parameters, which with the distributed optimizer are
this process's share of every weight. For a checkpoint it is spread out into the gradient buffers, whose numbers nobody
needs between two steps: they have its places, its type, and room for the shares of all processes.
"""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from megatron_eagle.compat.gradient_buffers import gather_shares


class Ema:
    """optimizer: whose main parameters are averaged. owners: all that holds its gradient buffers."""

    def __init__(self, decay: float, optimizer: ChainedOptimizer, owners: Sequence[DistributedDataParallel]) -> None:
        self._average = get_ema_multi_avg_fn(decay)
        self._optimizer, self._owners = optimizer, owners
        self.means: list[Tensor] = []

    def begin(self) -> None:
        """Start from the weights as they are, unless it has started; before a stage's first step, all is loaded."""
        if not self.means:
            self.means = [main.detach().clone() for main in self._mains()]

    def update(self) -> None:
        """Take in the weights of the step just made."""
        if self.means:  # a process may have nothing to train
            self._average(self.means, [main.detach() for main in self._mains()], None)

    def to_gradients(self) -> None:
        """Make every weight's ``main_grad`` the whole of its mean; every process of the run calls this together."""
        for place, mean in zip(self._places(), self.means, strict=True):
            place.copy_(mean)
        for owner in self._owners:
            gather_shares(owner)

    def from_gradients(self) -> None:
        """Take the mean from what every weight's ``main_grad`` is."""
        self.means = [place.clone() for place in self._places()]

    def _mains(self) -> list[torch.nn.Parameter]:
        return [main for part in self._optimizer.chained_optimizers for main in part.get_parameters()]

    def _places(self) -> list[Tensor]:
        """Of every main parameter its place in the gradient buffers."""
        self._optimizer.prepare_grads()  # float32 sums are handed to the main parameters as views
        return [main.grad for main in self._mains() if main.grad is not None]
