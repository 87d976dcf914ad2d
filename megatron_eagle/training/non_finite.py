"""Where a loss or a gradient stopped being a number: the module, the samples, and what is left to go on from.

A step whose gradients are not finite changes no weight (``training/optimizer.py``), so that the same packs can be run
once more with an ear at every module. The first output that is not finite is the cause or one step behind it; all that
follows is its echo. Every process looks at what it holds, and all of them come to the same report.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.training.engine import Engine, run_schedule

SAMPLES_NAMED = 8
ADVICE = (
    "look at those samples; lower the learning rate or lengthen the warm-up from that checkpoint; train a few steps "
    "with precision=fp32 to see whether it is the number format"
)
# Where something was found, in the order of a step; among outputs the encoders come before the pipeline.
_WEIGHTS, _OUTPUT, _GRADIENT = range(3)


class NonFinite(Exception):
    """A loss or gradient norm that is not finite; the message says where it began and what to try."""


@dataclass(frozen=True, order=True)
class Finding:
    """The first thing that was not finite on one process; the smallest of all processes' is the step's first.

    kind: weights, an output of the forward pass, or a gradient. pack: which of the replica's. chunk: the part of the
    pipeline, -1 for spread encoders. place: position among what was looked at in this chunk. bad: how many of its
    ``numbers`` are not finite.
    """

    kind: int
    pack: int
    chunk: int
    place: int
    rank: int
    name: str
    bad: int
    numbers: int
    samples: tuple[str, ...]

    def __str__(self) -> str:
        what = {
            _WEIGHTS: f"the weights {self.name} are not finite themselves",
            _OUTPUT: f"the first output that is not finite is that of {self.name}",
            _GRADIENT: f"all outputs are finite, the gradient of {self.name} is not",
        }[self.kind]
        where = f"{what} ({self.bad:,} of {self.numbers:,} numbers, rank {self.rank})"
        return where + (f", with the samples {_name_some(self.samples)}" if self.samples else "")


def explain(engine: Engine, batches: Sequence[PackedBatch], groups: Groups) -> Finding | None:
    """Run ``batches``, the replica's packs of the step, forward once more; the first that was not finite, if any is.

    batches: with normalised weights, as ``Engine.forward_backward`` had them. Gradients are looked at where the step
    left them. Every process of the run calls this; all return the same.
    """
    own = _find_in_weights(engine, groups.rank)
    found = _agree(own) or _agree(_find_in_outputs(engine, batches, groups))
    return found or _agree(_find_in_gradients(engine, batches, groups))


def describe(
    where: str, loss: float, grad_norm: float, found: Finding | None, samples: Sequence[str], last_good: Path | None
) -> str:
    """One line for the user. where: stage and step. samples: of this replica's step, named if no pack is to blame."""
    numbers = f"loss {loss}, gradient norm {grad_norm}"
    kept = "" if math.isfinite(grad_norm) else ", no weight was changed"
    cause = str(found) if found else "run once more, every output and gradient is finite: a fault of the machine?"
    if not (found and found.samples):
        cause += f"; samples of this replica's step: {_name_some(samples)}"
    label = "newest checkpoint" if found and found.kind == _WEIGHTS else "last good checkpoint"
    checkpoint = f"{label}: {last_good}" if last_good else "there is no checkpoint yet"
    return f"{where}: {numbers}{kept}; {cause}; {checkpoint}; try: {ADVICE}"


def _name_some(samples: Sequence[str]) -> str:
    more = len(samples) - SAMPLES_NAMED
    return ", ".join(samples[:SAMPLES_NAMED]) + (f" and {more} more" if more > 0 else "")


def _agree(own: Finding | None) -> Finding | None:
    """The first finding of all processes."""
    found: list[Finding | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return min((item for item in found if item), default=None)


def _find_in_weights(engine: Engine, rank: int) -> Finding | None:
    for chunk, module in _chunks(engine):
        for place, (name, weight) in enumerate(module.named_parameters()):
            if bad := _count_bad(weight):
                return Finding(_WEIGHTS, 0, chunk, place, rank, name, bad, weight.numel(), ())
    return None


def _find_in_outputs(engine: Engine, batches: Sequence[PackedBatch], groups: Groups) -> Finding | None:
    outputs: list[_Output] = []
    with torch.no_grad(), _listening(engine, groups, outputs):
        features = engine.encoder.encode(batches) if engine.encoder else None
        run_schedule(engine.chunks, batches, features, forward_only=True)
    pack_of_tiles = _first_bad_pack(features, groups)
    findings = []
    for place, output in enumerate(outputs):
        pack = pack_of_tiles if output.chunk < 0 else output.pack
        samples = tuple(batches[pack].sample_ids)
        findings.append(
            Finding(_OUTPUT, pack, output.chunk, place, groups.rank, output.name, output.bad, output.numbers, samples)
        )
    return min(findings, default=None)


def _find_in_gradients(engine: Engine, batches: Sequence[PackedBatch], groups: Groups) -> Finding | None:
    """The backward pass goes through a model from its end, so the last module with such a gradient had it first."""
    for chunk, module in reversed(list(_chunks(engine))):
        parameters = list(module.named_parameters())
        for place, (name, weight) in enumerate(reversed(parameters)):
            gradient = getattr(weight, "main_grad", None)
            if weight.requires_grad and gradient is not None and (bad := _count_bad(gradient)):
                last_first = -(chunk * groups.pp_size + groups.pp_rank)
                return Finding(_GRADIENT, 0, last_first, place, groups.rank, name, bad, gradient.numel(), ())
    return None


def _chunks(engine: Engine) -> Iterator[tuple[int, nn.Module]]:
    """This process's modules in the order of a step, with the number of the (virtual) chunk; spread encoders are -1."""
    if engine.encoder:
        yield -1, engine.encoder.copy
    yield from enumerate(engine.models)


@dataclass(frozen=True)
class _Output:
    """A module's output that was not finite. chunk: place in the pipeline of all processes."""

    pack: int
    chunk: int
    name: str
    bad: int
    numbers: int


@contextmanager
def _listening(engine: Engine, groups: Groups, outputs: list[_Output]) -> Iterator[None]:
    """Put the outputs of all modules that are not finite into ``outputs``, in the order in which they were made."""
    handles = []
    for number, module in _chunks(engine):
        chunk = -1 if number < 0 else number * groups.pp_size + groups.pp_rank
        started = [-1]  # which pack the chunk is at

        def count(*_: Any, started: list[int] = started) -> None:
            started[0] += 1

        handles.append(module.register_forward_pre_hook(count))
        for name, part in module.named_modules():

            def look(
                part: nn.Module, _: Any, output: Any, name: str = name, chunk: int = chunk, at: list[int] = started
            ) -> None:
                tensors = [tensor for tensor in _tensors(output) if tensor.is_floating_point()]
                if bad := sum(map(_count_bad, tensors)):
                    label = f"{name} ({type(part).__name__})" if name else type(part).__name__
                    outputs.append(_Output(at[0], chunk, label, bad, sum(tensor.numel() for tensor in tensors)))

            handles.append(part.register_forward_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_bad_pack(features: Sequence[Tensor] | None, groups: Groups) -> int:
    """Which of the replica's packs has features that are not finite; they lie on the first stage, all must know."""
    own = next((pack for pack, leaf in enumerate(features or ()) if _count_bad(leaf)), None)
    found: list[int | None] = [None] * groups.replica_size
    dist.all_gather_object(found, own, group=groups.replica_hosts)
    return min((pack for pack in found if pack is not None), default=0)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, list | tuple):
        yield from (tensor for value in output for tensor in _tensors(value))


def _count_bad(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())
