"""The plan of a stage: does it fit, how long does it take, where is time lost.

Puts together what the other modules of this package count: packs (``samples.py``), memory of every pipeline stage
(``memory.py``), seconds of every pass (``timing.py``) and the simulated schedule (``simulator.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from megatron_eagle.config.data import DataSettings
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.lora import is_adapter
from megatron_eagle.config.model import tokens_per_tile
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.order.share_packs import PackWork, rank_times, share_packs
from megatron_eagle.errors import UserError
from megatron_eagle.model.flops import StepFlops, Work, step_flops
from megatron_eagle.parallel.shard_tiles import TileShards
from megatron_eagle.planning.activations import Activations, PackShape
from megatron_eagle.planning.hardware import Hardware
from megatron_eagle.planning.memory import (
    BYTES,
    GRADIENT_BYTES,
    Memory,
    ProcessRanks,
    gradient_buffers,
    memory_of,
    persistent,
)
from megatron_eagle.planning.parameters import layers_of_chunks, stage_weights
from megatron_eagle.planning.samples import Samples
from megatron_eagle.planning.schedule import Pass
from megatron_eagle.planning.simulator import Timeline, simulate
from megatron_eagle.planning.timing import Timing

REPLICAS_SIMULATED = 4
PACKS_DRAWN = 32  # at least, over the replicas that are simulated: fewer do not show how packs differ


@dataclass(frozen=True)
class StagePlan:
    """What a stage of a recipe needs on a number of GPUs.

    memory: of the fullest process of each pipeline stage. seconds: of a step; pipeline, encoders, reduction and update
    are its parts; gradient_sums: the part of ``reduction`` before the update. flops: useful operations of one step over
    all GPUs. samples: in one step.
    """

    stage: Stage
    layout: Layout
    recompute: str
    recompute_layers: int | None
    gpus: int
    hardware: Hardware
    memory: tuple[Memory, ...]
    timeline: Timeline
    seconds: float
    pipeline: float
    encoders: float
    reduction: float
    gradient_sums: float
    update: float
    flops: StepFlops
    useful_tokens: float
    tokens: int
    tiles: float
    samples: float
    checkpoint_bytes: float

    @property
    def peak(self) -> float:
        return max(memory.peak for memory in self.memory)

    @property
    def again(self) -> str:
        """What is computed again in the backward pass, in words."""
        return self.recompute if self.recompute_layers is None else f"{self.recompute_layers} layers of each stage"

    @property
    def fits(self) -> bool:
        return self.peak <= self.hardware.usable_bytes

    @property
    def mfu(self) -> float:
        """Useful operations over the stated peak of all GPUs."""
        return self.flops.total / (self.seconds * self.gpus * self.hardware.peak_flops)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.useful_tokens / self.seconds / self.gpus

    @property
    def checkpoint_seconds(self) -> float:
        nodes = -(-self.gpus // self.hardware.gpus_per_node)
        return self.checkpoint_bytes / nodes / self.hardware.checkpoint_bytes_per_second

    def hours(self, samples: float | None = None) -> float:
        """For ``samples`` samples, or for the steps of the recipe."""
        steps = self.stage.steps if samples is None else samples / self.samples
        return steps * self.seconds / 3600


def plan_stage(
    recipe: Recipe, stage: Stage, gpus: int, hardware: Hardware, mix: Samples, simulated: int = REPLICAS_SIMULATED
) -> StagePlan:
    """Plan ``stage`` of ``recipe`` on ``gpus`` GPUs; UserError if they cannot be split as the layout says.

    simulated: replicas whose packs are drawn, at least; the slowest sets the pace.
    """
    recipe = recipe.with_kernels_on(hardware.device)
    layout, config = recipe.stage_layout(stage), recipe.model.eagle()
    try:
        replicas = layout.data_parallel_size(gpus)
        layout.check_pack_length(stage.pack_length)
    except ValueError as error:
        raise UserError(f"stage '{stage.name}': {error}") from None
    if stage.batch % replicas:
        raise UserError(f"stage '{stage.name}': batch={stage.batch} packs cannot be shared out to {replicas} replicas")
    sizes = Activations.of(recipe, stage)
    drawn, samples = draw_replicas(stage, replicas, mix, tokens_per_tile(config), simulated)
    packs, shown = list(chain.from_iterable(drawn)), len(drawn)
    timing = Timing(sizes, hardware)
    costs = recipe.data_settings(stage)
    runs = [_replica(timing, own, gpus, costs) for own in drawn]
    slowest = max(runs, key=lambda run: run[0].seconds + run[1])
    fullest = fullest_of(drawn)
    memory = tuple(memory_of(recipe, stage, gpus, ProcessRanks(pp), fullest) for pp in range(layout.pp))
    reduction, sums, update = _behind(recipe, stage, gpus, timing)
    useful = sum((pack.useful() for pack in packs), Work(0, 0, 0)) * (replicas / shown)
    pipeline, encoders = slowest[0].seconds, slowest[1]
    return StagePlan(
        stage=stage,
        layout=layout,
        recompute=recipe.model.recompute,
        recompute_layers=recipe.model.recompute_layers,
        gpus=gpus,
        hardware=hardware,
        memory=memory,
        timeline=slowest[0],
        seconds=pipeline + encoders + reduction + update,
        pipeline=pipeline,
        encoders=encoders,
        reduction=reduction,
        gradient_sums=sums,
        update=update,
        flops=step_flops(config, sizes.parts, useful),
        useful_tokens=useful.tokens,
        tokens=stage.batch * stage.pack_length,
        tiles=useful.tiles,
        samples=samples * replicas / shown,
        checkpoint_bytes=checkpoint_bytes(recipe, stage),
    )


def draw_replicas(
    stage: Stage, replicas: int, mix: Samples, tokens_per_tile: int, simulated: int
) -> tuple[list[list[PackShape]], int]:
    """(the packs of some of ``replicas``, at least ``simulated`` and enough to show how packs differ; samples in them).

    UserError if no sample fits into a pack.
    """
    each = stage.batch // replicas
    shown = min(replicas, max(simulated, -(-PACKS_DRAWN // each)))
    packs, samples = mix.packs(each * shown, stage.pack_length, tokens_per_tile)
    if not packs:
        raise UserError(f"stage '{stage.name}': no sample fits into a pack of {stage.pack_length} tokens")
    packs = [packs[number % len(packs)] for number in range(each * shown)]  # the last ones may not have been filled
    return [packs[number::shown] for number in range(shown)], samples


def fullest_of(drawn: Sequence[Sequence[PackShape]]) -> Sequence[PackShape]:
    """The packs of the replica with most tiles."""
    return max(drawn, key=lambda own: sum(pack.tiles for pack in own))


def _replica(timing: Timing, packs: Sequence[PackShape], gpus: int, costs: DataSettings) -> tuple[Timeline, float]:
    """(the pipeline, seconds of spread encoders beside it) of one replica. costs: what packs are shared by."""
    layout = timing.sizes.layout
    timeline = _shared(timing, packs, costs) if layout.least_cp else _pipeline(timing, packs, gpus)
    if layout.encoder == "tensor":
        return timeline, 0.0
    total = sum(pack.tiles for pack in packs)
    own = max(TileShards.of(total, layout.model_parallel_size).per_rank)
    return timeline, timing.spread(own, total)


def _shared(timing: Timing, packs: Sequence[PackShape], costs: DataSettings) -> Timeline:
    """Packs shared by as many context-parallel ranks as each needs; what ranks wait for each other is the bubble."""
    layout = timing.sizes.layout
    work = [PackWork.of_segments(pack.segments, pack.tiles, costs.attention_parity, costs.tile_cost) for pack in packs]
    shares = share_packs(work, layout.cp, layout.least_cp or layout.cp)
    passes = [
        replace(timing, sizes=timing.sizes.shared_by(len(own))).table(0, [pack])[0]
        for pack, own in zip(packs, shares, strict=True)
    ]
    times = [one.forward + one.backward for one in passes]
    busy = sum(each * len(own) for each, own in zip(times, shares, strict=True)) / layout.cp
    return Timeline((busy,), max(rank_times(times, shares, layout.cp)), ({},), ({},))


def _pipeline(timing: Timing, packs: Sequence[PackShape], gpus: int) -> Timeline:
    layout = timing.sizes.layout
    count = layout.pp * (layout.vpp or 1)
    tables = {stage: timing.table(stage, packs) for stage in {0, min(1, count - 1), count - 1}}
    layers = layers_of_chunks(timing.sizes.config, layout)

    def duration(stage: int, event: Pass) -> float:
        own = tables.get(stage) or [each * (layers[stage] / layers[1]) for each in tables[1]]
        tables[stage] = own
        seconds = own[event.microbatch]
        return seconds.forward if event.kind == "forward" else seconds.backward

    transfer = timing.transfer(packs[0], gpus) if layout.pp > 1 else 0.0
    return simulate(layout.pp, layout.vpp, len(packs), duration, transfer)


def _behind(recipe: Recipe, stage: Stage, gpus: int, timing: Timing) -> tuple[float, float, float]:
    """(gradient sums and new weights, gradient sums alone, Adam), seconds of the slowest pipeline stage."""
    layout, overlap = recipe.stage_layout(stage), recipe.optimizer.overlap
    most = (0.0, 0.0, 0.0)
    for pp in range(layout.pp):
        _, _, states, _ = persistent(recipe, stage, gpus, ProcessRanks(pp))
        each = (12 if recipe.weight_precision == "bf16" else 8) + 4 * (stage.ema is not None)
        sums = weights = 0.0
        for elements, ranks, copy in gradient_buffers(recipe, stage, gpus, pp):
            stride = 1 if copy else layout.tp
            hidden = overlap and not copy
            sums += timing.gradients(elements * GRADIENT_BYTES, ranks, stride, overlap=hidden)
            weights += timing.gradients(elements * BYTES[recipe.weight_precision], ranks, stride, overlap=False)
        most = max(most, (sums + weights, sums, timing.update(states / each)))
    return most


def checkpoint_bytes(recipe: Recipe, stage: Stage) -> float:
    """A whole checkpoint: every weight once, of LoRA every adapter, and float32 weights and moments of what trains."""
    alone = replace(recipe, layout=Layout(), stages=(replace(stage, layout=Layout()),))
    weights, _, states, _ = persistent(alone, alone.stages[0], 1, ProcessRanks(0))
    if recipe.lora:
        held = stage_weights(recipe.model.eagle(), Layout(), 0, recipe.lora)[0]
        weights = BYTES[recipe.weight_precision] * sum(weight.elements for weight in held if is_adapter(weight.name))
    return float(weights + states)


def describe_layout(layout: Layout) -> str:
    """``tp=2 pp=4`` and whatever else is not the default."""
    words = [f"tp={layout.tp}", f"pp={layout.pp}"]
    words += [f"vpp={layout.vpp}"] if layout.vpp else []
    words += [f"cp={layout.cp}"] if layout.cp > 1 else []
    words += [f"least_cp={layout.least_cp}"] if layout.least_cp else []
    words += [f"ulysses={layout.ulysses}"] if layout.ulysses > 1 else []
    words += ["sp"] if layout.sequence_parallel else []
    words += [f"encoder={layout.encoder}"]
    words += [f"chunk={layout.encoder_chunk}"] if layout.encoder_chunk else []
    return " ".join(words)
