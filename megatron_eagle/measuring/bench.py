"""Measures what the planner predicts: some steps of a recipe, on synthetic packs or the stage's own.

Every process of the job calls ``run_bench``. Synthetic packs have meaningless tokens and pixels in the shapes that the
plan was made for, so no data, tokenizer or checkpoint is needed. Packs are made before the clock starts: what is timed
is a step without reading. ``bench_report.py`` writes the result down.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.layers import frozen_layers
from megatron_eagle.config.model import tokens_per_tile
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.data.stream.streams import first_steps
from megatron_eagle.measuring.accounting import TensorAccounting, held_bytes, storage_bytes
from megatron_eagle.parallel.groups import Groups, destroy, initialise
from megatron_eagle.planning.activations import PackShape
from megatron_eagle.planning.hardware import Hardware
from megatron_eagle.planning.memory import ProcessRanks, memory_of
from megatron_eagle.planning.plan import StagePlan, describe_layout, plan_stage
from megatron_eagle.planning.samples import Given, Samples, synthetic
from megatron_eagle.training.engine import Engine, build_engine
from megatron_eagle.training.step import COMPUTING, DISTRIBUTING, PHASES, UPDATING, Step, packs_per_replica
from megatron_eagle.training.throughput import useful_flops

WARM_UP = 1  # steps that are not counted


@dataclass(frozen=True)
class Measurement:
    """One run.

    seconds: of each counted step; phases: mean seconds of its parts. peak_bytes: of the first process's tensors, as
    PyTorch counts them on a GPU and ``accounting.py`` on a CPU. predicted_seconds, predicted_phases, predicted_bytes:
    what the plan says of the same packs. mfu: of the profile's stated peak.
    """

    date: str
    recipe: str
    stage: str
    layout: str
    processes: int
    device: str
    torch: str
    packs: int
    pack_length: int
    packs_are: str
    seconds: list[float]
    phases: dict[str, float]
    useful_tokens_per_second: float
    padding: float
    tflops_per_process: float
    mfu: float
    peak_bytes: int
    predicted_seconds: float
    predicted_phases: dict[str, float]
    predicted_bytes: float
    profile: str
    reduced: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of every step, those that warm up included


def run_bench(
    recipe: Recipe,
    stage: Stage,
    platform: Platform,
    hardware: Hardware,
    samples: Samples | None,
    steps: int,
    *,
    trace: Path | None = None,
    reduced: Sequence[str] = (),
    prepare: Callable[[Engine], object] = lambda engine: None,
) -> Measurement | None:
    """Train ``steps`` counted steps; the measurement on rank 0, None on the others.

    samples: shapes of synthetic packs, None for the first packs of the stage's own data. trace: file that gets one more
    step as torch's profiler sees it on rank 0. reduced: what differs from the recipe, for the report.
    prepare: called before the first step, to give the model other weights than those of the recipe's seed.
    """
    recipe = recipe.with_kernels_on(platform.device.type)
    layout = recipe.stage_layout(stage)
    groups = initialise(layout, platform, timeout=timedelta(minutes=recipe.collective_timeout_minutes))
    try:
        packs_per_replica(stage, groups.dp_size)
        whole, described = _packs(recipe, stage, samples)
        shapes = Given(tuple(_shape(batch) for batch in whole))
        plan = plan_stage(recipe, stage, groups.world_size, hardware, shapes, simulated=groups.dp_size)
        bench = _Bench(recipe, stage, platform, groups, whole[groups.dp_rank :: groups.dp_size])
        prepare(bench.taken.engine)
        times = [bench.step() for _ in range(WARM_UP + steps)][WARM_UP:]
        losses, peak = list(bench.losses), bench.peak_bytes()
        if trace is not None:
            with _traced(trace if groups.rank == 0 else None, platform.device):
                bench.step()
        if groups.rank:
            return None
        found = _summary(recipe, stage, hardware, groups, plan, whole, times, peak, described, platform, reduced)
        return replace(found, losses=losses)
    finally:
        destroy()


def _summary(
    recipe: Recipe,
    stage: Stage,
    hardware: Hardware,
    groups: Groups,
    plan: StagePlan,
    whole: Sequence[PackedBatch],
    times: list[list[float]],
    peak: int,
    described: str,
    platform: Platform,
    reduced: Sequence[str],
) -> Measurement:
    mean = statistics.mean(map(sum, times))
    own = [_shape(batch) for batch in whole[:: groups.dp_size]]
    config = recipe.model.eagle()
    frozen = frozen_layers(config, stage.freeze)
    rate = useful_flops(config, stage.trainable, whole, recipe.lora, frozen) / mean / groups.world_size
    useful = sum(batch.useful_tokens for batch in whole)
    return Measurement(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        recipe=recipe.name,
        stage=stage.name,
        layout=describe_layout(plan.layout),
        processes=groups.world_size,
        device=torch.cuda.get_device_name() if platform.device.type == "cuda" else "cpu",
        torch=torch.__version__,
        packs=stage.batch,
        pack_length=stage.pack_length,
        packs_are=described,
        seconds=[sum(step) for step in times],
        phases={name: statistics.mean(step[number] for step in times) for number, name in enumerate(PHASES)},
        useful_tokens_per_second=useful / mean,
        padding=1 - useful / (stage.batch * stage.pack_length),
        tflops_per_process=rate / 1e12,
        mfu=rate / hardware.peak_flops,
        peak_bytes=peak,
        predicted_seconds=plan.seconds,
        predicted_phases={
            COMPUTING: plan.pipeline + plan.encoders + plan.gradient_sums,
            UPDATING: plan.update + plan.reduction - plan.gradient_sums,
        },
        predicted_bytes=memory_of(recipe, stage, groups.world_size, ProcessRanks(0), own).peak,
        profile=hardware.name,
        reduced=list(reduced),
    )


def _packs(recipe: Recipe, stage: Stage, samples: Samples | None) -> tuple[list[PackedBatch], str]:
    """All packs of a step, the same on every process, and what they are."""
    config = recipe.model.eagle()
    cost = tokens_per_tile(config)
    if samples is not None:
        shapes, _ = samples.packs(stage.batch, stage.pack_length, cost)
        packs = [synthetic(shape, config.tile_size, cost) for shape in shapes]
        return [packs[number % len(packs)] for number in range(stage.batch)], f"synthetic, {samples.describe()}"
    (packs,) = first_steps(recipe, stage, 1, stage.batch)
    return packs, "the first of the stage's own data"


def _shape(batch: PackedBatch) -> PackShape:
    return PackShape(batch.segment_lengths, len(batch.tile_starts), batch.length - batch.useful_tokens)


class _Bench:
    """One process's engine and packs."""

    def __init__(
        self, recipe: Recipe, stage: Stage, platform: Platform, groups: Groups, own: Sequence[PackedBatch]
    ) -> None:
        self.device, self.own = platform.device, list(own)
        self.losses: list[float] = []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what ran here before
        engine = build_engine(recipe, stage, platform, groups)
        engine.pack_base()
        self.taken = Step(engine, groups, stage, platform.device)

    def step(self) -> list[float]:
        """Seconds of each of ``PHASES``."""
        seconds = dict.fromkeys(PHASES, 0.0)

        @contextmanager
        def timed(name: str) -> Iterator[None]:
            started = self._now()
            yield
            seconds[name] += self._now() - started

        result = self.taken.run(lambda: self.own, phase=timed)
        self.losses.append(self.taken.collect(result).loss)
        return list(seconds.values())

    def peak_bytes(self) -> int:
        """Most bytes of tensors at a time; on a CPU counted in one more step, which is slow."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        seen = TensorAccounting()
        result = self.taken.run(lambda: self.own, phase=lambda name: nullcontext() if name == DISTRIBUTING else seen)
        inputs = storage_bytes(t for batch in result.batches for t in vars(batch).values() if torch.is_tensor(t))
        return sum(held_bytes(self.taken.engine).values()) + inputs + seen.peak

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def _traced(path: Path | None, device: torch.device) -> Iterator[None]:
    """Write what happens inside to ``path`` as a trace for Perfetto or chrome://tracing; None for nothing."""
    if path is None:
        yield
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
