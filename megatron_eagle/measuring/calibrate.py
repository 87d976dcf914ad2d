"""Finds the rates of a machine from one short run, for a hardware profile of its own.

Each process times what the planner cannot know: an exchange with its neighbours, a few forward and backward passes of
the recipe's model on packs that differ in what they are made of - one long segment, many short ones, few tokens, many
tiles - and on a CPU, of which nobody states it, the largest matrix product and a copy of memory. All processes do so at
the same time, as in training, where they share caches and memory. The achievable shares are then those with which the
planner's own formulas come closest to the times measured.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from socket import gethostname
from typing import Any

import torch
import torch.distributed as dist

from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import tokens_per_tile
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.parallel.groups import Groups, destroy, initialise
from megatron_eagle.planning.activations import Activations, PackShape
from megatron_eagle.planning.hardware import Hardware
from megatron_eagle.planning.samples import synthetic
from megatron_eagle.planning.timing import Timing
from megatron_eagle.training.engine import build_engine
from megatron_eagle.training.step import Step

FITTED = ("products", "attention", "convolutions", "memory_share", "launch")
BAD_FIT = 0.3  # of the seconds of a pass; nine layouts of docs/planning.md were within 0.22
REPEATS = 3  # of which the fastest counts: whatever disturbs a run makes it slower
PRODUCT_SIDE = 768
COPIED_BYTES = 64 << 20
EXCHANGED_BYTES = 16 << 20


@dataclass(frozen=True)
class Timed:
    """A pack, and the seconds of its forward and backward pass."""

    pack: PackShape
    seconds: float


def calibrate(recipe: Recipe, stage: Stage, platform: Platform, start: Hardware) -> Hardware | None:
    """A profile of this machine, with ``start``'s numbers where nothing was measured; None on all ranks but 0."""
    alone = replace(stage, layout=Layout())
    groups = initialise(Layout(), platform, timeout=timedelta(minutes=recipe.collective_timeout_minutes))
    try:
        measured = _machine(groups, platform.device)
        runs = _passes(replace(recipe, stages=(alone,)), alone, platform, groups)
        if groups.rank:
            return None
        sizes = Activations.of(recipe, alone)
        hardware = fit(replace(start, **measured), sizes, runs)
        return _explained(hardware, groups.world_size, {*FITTED, *measured}, off=worst_error(hardware, sizes, runs))
    finally:
        destroy()


def variants(length: int, tokens_per_tile: int) -> list[PackShape]:
    """Packs that tell the rates apart."""
    most = length // tokens_per_tile
    eighth = length // 8
    return [
        PackShape((length,), 0),
        PackShape((eighth,) * 8, 0),
        PackShape((length // 2,), 0),
        PackShape((eighth,), 0),
        PackShape((length // 2, length // 2), 2 * (most // 4)),
        PackShape((length,), most),
        PackShape((eighth,), most // 8 or 1),
    ]


def predicted(hardware: Hardware, sizes: Activations, pack: PackShape) -> float:
    """Seconds of a pack's forward and backward pass on a process that holds the whole model."""
    (passes,) = Timing(sizes, hardware).table(0, [pack])
    return passes.forward + passes.backward


def fit(start: Hardware, sizes: Activations, runs: Sequence[Timed]) -> Hardware:
    """``start`` with the shares in ``FITTED`` that bring ``predicted`` closest to ``runs``, in ratio.

    One share after another is moved by ever smaller factors while that helps; there are five, and a run takes
    microseconds to predict.
    """
    best, least = start, _misfit(start, sizes, runs)
    factor = 2.0
    while factor > 1.005:
        improved = False
        for name in FITTED:
            for step in (factor, 1 / factor):
                limit = 1.0 if name != "launch" else math.inf
                moved: dict[str, Any] = {name: min(limit, getattr(best, name) * step)}
                trial = replace(best, **moved)
                misfit = _misfit(trial, sizes, runs)
                if misfit < least * (1 - 1e-9):
                    best, least, improved = trial, misfit, True
        factor = factor if improved else math.sqrt(factor)
    return best


def worst_error(hardware: Hardware, sizes: Activations, runs: Sequence[Timed]) -> float:
    """Largest error of ``predicted``, as a share of what was measured."""
    return max(abs(predicted(hardware, sizes, run.pack) / run.seconds - 1) for run in runs)


def _misfit(hardware: Hardware, sizes: Activations, runs: Sequence[Timed]) -> float:
    return sum(math.log(predicted(hardware, sizes, run.pack) / run.seconds) ** 2 for run in runs)


def _passes(recipe: Recipe, stage: Stage, platform: Platform, groups: Groups) -> list[Timed]:
    """Each variant alone in a step, at the same time on all processes; sums of gradients are taken off."""
    config = recipe.model.eagle()
    cost = tokens_per_tile(config)
    engine = build_engine(recipe, stage, platform, groups)
    step = Step(engine, groups, stage, platform.device)

    def sums() -> None:
        for owner in engine.gradient_owners():
            owner.zero_grad_buffer()
            owner.finish_grad_sync()

    exchanged = _fastest(sums, platform.device)
    runs = []
    for pack in variants(stage.pack_length, cost):
        batch = synthetic(pack, config.tile_size, cost).to(platform.device)
        seconds = _fastest(partial(engine.forward_backward, step.normalise([batch])), platform.device)
        runs.append(Timed(pack, seconds - exchanged))
    return runs


def _machine(groups: Groups, device: torch.device) -> dict[str, Any]:
    """Peak, memory and link of a process while all others do the same; on a GPU the link alone."""
    found: dict[str, Any] = _peaks(device) if device.type == "cpu" else {}
    size = groups.world_size
    if size > 1:
        short, long = (torch.zeros(count // 4 // size * size, device=device) for count in (256, EXCHANGED_BYTES))
        whole, part = torch.empty_like(long), torch.empty(len(long) // size, device=device)

        def both_ways() -> None:
            dist.reduce_scatter_tensor(part, long)
            dist.all_gather_into_tensor(whole, part)

        moved = 2 * 4 * len(long) * (size - 1) / size
        found["latency"] = _fastest(lambda: dist.all_reduce(short), device, 10)
        found["inside_bytes_per_second"] = moved / _fastest(both_ways, device)
        found["link_share"] = 1.0
    return found


def _peaks(device: torch.device) -> dict[str, Any]:
    """What a CPU can do at most. A GPU's maker states it, and utilisation is a share of what is stated."""
    square = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device=device)
    block = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    return {
        "peak_flops": 2.0 * PRODUCT_SIDE**3 / _fastest(lambda: square @ square, device, 10),
        "memory_bytes_per_second": 2.0 * COPIED_BYTES / _fastest(lambda: target.copy_(block), device),
    }


def _fastest(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Seconds of the fastest of several runs, behind one that warms up; all processes start together."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _explained(hardware: Hardware, processes: int, found: set[str], off: float) -> Hardware:
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    how = f"measured on {date} by {processes} process(es) at once"
    fitted = f"{how}; fitted to passes of the model, the worst of which it misses by {off:.0%}"
    if off > BAD_FIT:
        fitted += f": A BAD FIT (above {BAD_FIT:.0%}), plans made with it are as wrong; calibrate on a machine at rest"
    sources = {
        name: (fitted if name in FITTED else how) if name in found else source
        for name, source in hardware.sources.items()
    }
    return replace(hardware, name=f"{hardware.name}-{gethostname()}", sources=sources)
