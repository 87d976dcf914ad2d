"""Walks a job of hundreds of processes through one step on this machine, without a GPU and without the others.

Every distinct process is built by the trainer's own code and taken through a whole step - packs distributed, encoders,
pipeline, gradient sums, optimizer, the step's numbers - on tensors without memory (``symbolic_rank.py``). Its bytes
must equal the planner's account exactly. What it would exchange is written down, repeated for all processes of its
kind, and played out for the whole job (``deadlock_check.py``): every collective must find all its members, in order and
with fitting sizes, and every message its receiver. Replicas whose packs hold no tile are among them, because those are
the ones that hang jobs.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch

from megatron_eagle.compat.fake_processes import join_alone
from megatron_eagle.compat.platform import Platform
from megatron_eagle.compat.process_groups import stand_in_for_gloo
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import tokens_per_tile
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.dry_run.deadlock_check import Program, as_seen_by, meet
from megatron_eagle.dry_run.symbolic_rank import Call, SymbolicRank
from megatron_eagle.errors import UserError
from megatron_eagle.measuring.accounting import held_bytes
from megatron_eagle.parallel.groups import Groups, RankCoordinates, destroy, split
from megatron_eagle.planning.activations import PackShape
from megatron_eagle.planning.memory import ProcessRanks, persistent
from megatron_eagle.planning.samples import Mix, synthetic
from megatron_eagle.planning.schedule import passes
from megatron_eagle.training.engine import build_engine
from megatron_eagle.training.step import Step, packs_per_replica

WALKED_OF_A_REPLICA = 8  # processes; of larger replicas only the first two tensor-parallel ranks of each place


@dataclass(frozen=True)
class Walked:
    """One process: bytes as built and as planned (weights, gradients, optimizer), and its exchanges in a step."""

    rank: int
    pp: int
    with_tiles: bool
    built: tuple[int, int, int]
    planned: tuple[int, int, int]
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class DryRun:
    """A stage of ``gpus`` processes: those that were walked, and how many exchanges of all met in ``packs`` packs."""

    stage: str
    gpus: int
    packs: int
    packs_in_step: int
    walked: list[Walked]
    met: int
    seconds: float

    @property
    def equal(self) -> bool:
        return all(process.built == process.planned for process in self.walked)

    def text(self) -> str:
        """One line a process and one for the whole."""
        lines = [
            f"{self.stage}: rank {p.rank} (pp {p.pp}{'' if p.with_tiles else ', packs without tiles'}): weights "
            f"{p.built[0]:,} gradients {p.built[1]:,} optimizer {p.built[2]:,} bytes, {len(p.calls):,} exchanges"
            f"{'' if p.built == p.planned else f', PLANNED {p.planned}'}"
            for p in self.walked
        ]
        verdict = "equal to the plan" if self.equal else "NOT equal to the plan"
        shortened = "" if self.packs == self.packs_in_step else f" (of {self.packs_in_step})"
        lines.append(
            f"{self.stage}: {len(self.walked)} distinct processes of {self.gpus} walked through a step of {self.packs} "
            f"packs{shortened} a replica in {self.seconds:.1f} s; bytes {verdict}; all {self.met:,} exchanges of the "
            f"{self.gpus} processes met"
        )
        return "\n".join(lines)


def dry_run(recipe: Recipe, stage: Stage, gpus: int) -> DryRun:
    """Walk every distinct process of ``stage`` on ``gpus`` GPUs and let all of them meet.

    Raises deadlock_check.CollectiveMismatch with rank and operation if one waits in vain, UserError if the layout does
    not fit.
    """
    layout = recipe.stage_layout(stage)
    try:
        replicas = layout.data_parallel_size(gpus)
    except ValueError as error:
        raise UserError(f"stage '{stage.name}': {error}") from None
    each = packs_per_replica(stage, replicas)
    started = time.perf_counter()
    # Transformer Engine's modules, others' attention and this project's kernels cannot run without a GPU. They exchange
    # what their stand-ins do, but for the loss kernel, which has its own sums among the processes that share the
    # vocabulary: as many on each, because these hold the same labels.
    stand_ins = replace(recipe.model, transformer_impl="local", kernels="torch", attention="packed")
    recipe = replace(recipe, model=stand_ins)
    packs = min(each, 2 * (layout.cp if layout.least_cp else layout.pp * (layout.vpp or 1)))
    match_exchanges(layout.pp, layout.vpp, each)
    places = coordinates(layout, gpus)
    walked, _ = walk_replicas(recipe, stage, places, packs)
    programs = [_program(rank, walked, places) for rank in range(gpus)]
    met = meet(programs, messages_wait=layout.vpp is None)
    return DryRun(stage.name, gpus, packs, each, list(walked.values()), met, time.perf_counter() - started)


def coordinates(layout: Layout, gpus: int) -> list[RankCoordinates]:
    """Where each global rank stands; Megatron counts tp fastest, then cp, dp and pp."""
    replicas = layout.data_parallel_size(gpus)
    return [
        RankCoordinates(dp=dp, pp=pp, cp=cp, tp=tp)
        for pp in range(layout.pp)
        for dp in range(replicas)
        for cp in range(layout.cp)
        for tp in range(layout.tp)
    ]


def match_exchanges(pp: int, vpp: int | None, microbatches: int) -> int:
    """Count the sends between pipeline stages; RuntimeError if one is not received in the order it was sent."""
    sent: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
    received: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
    last = pp * (vpp or 1) - 1
    for rank in range(pp):
        for event in passes(pp, vpp, rank, microbatches):
            stage = event.chunk * pp + rank
            step = 1 if event.kind == "forward" else -1
            if 0 <= stage + step <= last:
                to = (stage + step) % pp
                sent.setdefault((rank, to, event.kind), []).append((event.microbatch, stage + step))
            if 0 <= stage - step <= last:
                source = (stage - step) % pp
                received.setdefault((source, rank, event.kind), []).append((event.microbatch, stage))
    for channel in sent.keys() | received.keys():
        if sent.get(channel) != received.get(channel):
            raise RuntimeError(f"pipeline stage {channel[0]} sends to {channel[1]} what that does not wait for")
    return sum(map(len, sent.values()))


def walk_replicas(
    recipe: Recipe, stage: Stage, places: list[RankCoordinates], packs: int
) -> tuple[dict[RankCoordinates, Walked], list[list[PackShape]]]:
    """Processes of the first replica, whose packs but one have tiles, and of the second, whose packs have none.

    Returns them by place, and the packs of both replicas.
    """
    layout = recipe.stage_layout(stage)
    limit = layout.tp if layout.model_parallel_size <= WALKED_OF_A_REPLICA else 2
    shapes = [_shapes(recipe, stage, packs, with_tiles) for with_tiles in (True, False)]
    recorded: dict[tuple[int, ...], list[torch.Tensor]] = {}
    walked = {
        place: _walk(recipe, stage, places, rank, shapes[place.dp], recorded)
        for rank, place in enumerate(places)
        if place.dp < len(shapes) and place.tp < limit
    }
    return walked, shapes


def _shapes(recipe: Recipe, stage: Stage, count: int, with_tiles: bool) -> list[PackShape]:
    shapes, _ = Mix(packing=recipe.reading.packing).packs(
        count, stage.pack_length, tokens_per_tile(recipe.model.eagle())
    )
    shapes = [shapes[number % len(shapes)] for number in range(count)]
    empty = {count - 1} if with_tiles and count > 1 else set() if with_tiles else set(range(count))
    return [replace(pack, tiles=0) if number in empty else pack for number, pack in enumerate(shapes)]


def _program(rank: int, walked: dict[RankCoordinates, Walked], places: list[RankCoordinates]) -> Program:
    """Even replicas do as the first, odd ones as the second, whose packs hold no tile."""
    place = places[rank]
    like = replace(place, dp=place.dp % 2)
    exact = like in walked
    if not exact:
        like = replace(like, tp=1)
    process = walked[like]
    return Program(as_seen_by(process.calls, process.rank, rank, places), exact)


def _walk(
    recipe: Recipe,
    stage: Stage,
    places: list[RankCoordinates],
    rank: int,
    shapes: list[PackShape],
    recorded: dict[tuple[int, ...], list[torch.Tensor]],
) -> Walked:
    if recipe.lora and recipe.lora.base:
        raise UserError(f"lora.base: {recipe.lora.base} packs numbers, which a dry run has none of: take it out")
    config, layout, gpus = recipe.model.eagle(), recipe.stage_layout(stage), len(places)
    cost, place = tokens_per_tile(config), places[rank]
    batches = [synthetic(pack, config.tile_size, cost, torch.device("meta")) for pack in shapes]
    with alone_in_the_world(layout, places, rank) as groups, SymbolicRank(recorded) as symbolic:
        engine = build_engine(recipe, stage, Platform(torch.device("meta"), "gloo"), groups)
        step = Step(engine, groups, stage, torch.device("cpu"))
        step.collect(step.run(lambda: batches))
    held = held_bytes(engine)
    replica = (place.pp * layout.cp + place.cp) * layout.tp + place.tp
    planned = persistent(recipe, stage, gpus, ProcessRanks(place.pp, place.dp * layout.cp + place.cp, replica, rank))[
        :3
    ]
    return Walked(
        rank,
        place.pp,
        any(pack.tiles for pack in shapes),
        (held["weights"], held["gradients"], held["optimizer"]),
        planned,
        tuple(call for call in symbolic.calls if len(call.members) > 1),
    )


@contextmanager
def alone_in_the_world(layout: Layout, places: list[RankCoordinates], rank: int) -> Iterator[Groups]:
    """Process groups as process ``rank`` would have them, with nobody at the other end."""
    from megatron.core import parallel_state

    join_alone(rank, len(places))
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp,
            context_parallel_size=layout.cp,
            create_gloo_process_groups=False,
        )
        stand_in_for_gloo()
        yield split(layout, places, timedelta(minutes=1))
    finally:
        destroy()
