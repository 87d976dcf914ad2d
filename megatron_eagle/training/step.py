"""The one step: packs distributed, weights normalised, forward and backward, optimizer update, numbers collected.

Everything in this project that takes a step takes this one - the trainer, ``bench``, calibration, the dry run,
``verify`` - so that what is measured, walked through or proved is what trains. A caller names its phases, to time them
or to say in which one another process was lost, and may look at the gradients before they are used.

Nothing in it reads a number back from the device but Megatron's optimizer (the gradient norm, by which it clips) and
``collect``, once, when the update has been queued.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.config.recipe import Stage
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.errors import UserError
from megatron_eagle.parallel.distribute_batch import distribute_batch
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.training.engine import Engine
from megatron_eagle.training.loss import normalise_weights
from megatron_eagle.training.step_stats import StepStats, collect_stats

DISTRIBUTING, COMPUTING, UPDATING = PHASES = ("distributing packs", "forward and backward", "update")

Phase = Callable[[str], AbstractContextManager[Any]]


def packs_per_replica(stage: Stage, replicas: int) -> int:
    """Packs of a step that each replica trains on; UserError if they cannot be shared out evenly."""
    if stage.batch % replicas:
        raise UserError(
            f"stage '{stage.name}': batch={stage.batch} packs cannot be shared out evenly to {replicas} replicas"
        )
    return stage.batch // replicas


@dataclass(frozen=True)
class StepResult:
    """What a step left on this process.

    batches: the replica's packs, with weights as they were read. loss: this process's share of the step's, float64
    scalar, still on the device. grad_norm: before clipping. data_wait: seconds until the packs were here.
    """

    batches: list[PackedBatch]
    loss: Tensor
    grad_norm: float
    data_wait: float


@dataclass(frozen=True)
class Step:
    """Takes steps of ``stage`` with ``engine``; every process of the run calls the same methods in the same order.

    device: where packs go to.
    """

    engine: Engine
    groups: Groups
    stage: Stage
    device: torch.device

    def run(
        self,
        read: Callable[[], list[PackedBatch]],
        *,
        phase: Phase = lambda name: nullcontext(),
        before_update: Callable[[], object] = lambda: None,
    ) -> StepResult:
        """One step on the packs that ``read`` returns on the reader of each replica; it is not called elsewhere.

        phase: entered with each name of ``PHASES`` around what it names. before_update: called when all gradients are
        there, reduced and not yet clipped.
        """
        started = time.perf_counter()
        with phase(DISTRIBUTING):
            batches = distribute_batch(read, self.groups, self.device)
            data_wait = time.perf_counter() - started
            normalised = self.normalise(batches)
        with phase(COMPUTING):
            loss = self.engine.forward_backward(normalised)
        before_update()
        with phase(UPDATING):
            grad_norm = self.engine.update()
        return StepResult(batches, loss, grad_norm, data_wait)

    def normalise(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        """The replica's packs with the weights by which the step's loss is a plain sum."""
        return normalise_weights(
            batches,
            self.stage.loss_normaliser,
            packs_in_step=self.stage.batch,
            data_parallel_group=self.groups.dp,
        )

    def collect(self, result: StepResult, *, stop: bool = False, superseded: bool = False) -> StepStats:
        """The whole run's numbers of the step, on every process; ``stop`` and ``superseded`` are this one's."""
        config = self.engine.models[0].eagle
        return collect_stats(
            result.loss,
            result.batches,
            config,
            self.stage.trainable,
            self.groups,
            lora=self.engine.lora,
            frozen=self.engine.frozen,
            stop=stop,
            superseded=superseded,
        )
