"""Slowest rank over mean on packs of 131 072 tokens, for the ways to share their work out, by arithmetic.

    python benchmarks/long_packs.py

The mix is the one that docs/data.md reports: lognormal lengths, median 5600, sigma 1.0. Seconds are of Eagle2.5-8B's
language model with full recompute on the H100 of ``planning/profiles`` (``planning/timing.py``). Added to it: a group
waits in every layer for the place of its zigzag with the most pairs of positions, and its exchange of keys and values
runs through all adapters of a node, as NCCL's rings do; it is not overlapped with anything. "mean" is the work of all
ranks without exchange and without waiting, so what a way adds counts against it. No tiles, no gradient sums.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.data.order.balance_ranks import balance_ranks
from megatron_eagle.data.order.packing import pack_samples
from megatron_eagle.data.order.share_packs import PackWork, rank_times, share_packs
from megatron_eagle.data.reports.pack_report import lognormal_lengths
from megatron_eagle.parallel.context import ContextShard
from megatron_eagle.planning.activations import Activations, PackShape
from megatron_eagle.planning.hardware import load_hardware
from megatron_eagle.planning.timing import Timing, link_rate, ring_rate

LENGTH, MEDIAN, SIGMA, SAMPLES = 131_072, 5600, 1.0, 250_000
RANKS, STEPS, PARITY = 64, 10, 65_000
SIZES = (1, 2, 4, 8, 16)
CHOSEN = (8, 32, 128, 512, 2048, 8192)
PASSES_WITH_EXCHANGE = 3  # forward, forward again (recompute), backward


@dataclass(frozen=True)
class Pack:
    """segments: tokens of each, padding included. pairs: of the fullest place, times the places, by their number."""

    segments: tuple[int, ...]
    pairs: dict[int, float]

    @staticmethod
    def of(segments: Sequence[int]) -> "Pack":
        seen = np.concatenate([[0], np.cumsum(np.concatenate([np.arange(1, n + 1) for n in segments]))])
        pairs = {}
        for size in SIZES:
            places = [
                sum(float(seen[run.stop] - seen[run.start]) for run in ContextShard(size, 1, place).runs(LENGTH))
                for place in range(size)
            ]
            pairs[size] = max(places) * size
        return Pack(tuple(segments), pairs)

    @property
    def work(self) -> PackWork:
        return PackWork.of_segments(self.segments, 0, PARITY, 0.0)


@dataclass(frozen=True)
class Seconds:
    """Of a pack on each rank of a group: ``fixed`` for its tokens, ``by_pair`` for its attention, and the exchange."""

    fixed: float
    by_pair: float
    exchange: float

    @staticmethod
    def of(tp: int, size: int, one_adapter: bool = False) -> "Seconds":
        """one_adapter: between nodes a rank has its own alone, as the plan counts it."""
        recipe, hardware = load_recipe(Path("eagle2.5-8b")).with_kernels_on("cuda"), load_hardware("h100")
        layout = Layout(tp=tp, sequence_parallel=tp > 1)
        stage = replace(recipe.stage("stage4"), layout=layout)
        timing = Timing(Activations.of(replace(recipe, layout=layout, stages=(stage,)), stage), hardware)
        language = timing.sizes.config.language
        # On one rank, so that nothing is exchanged: every part of it is divided by the size of the group.
        shapes = PackShape((LENGTH,), 0), PackShape((LENGTH // 64,) * 64, 0)
        passes = [timing.layer(shape) * language.num_hidden_layers + timing.head(shape) for shape in shapes]
        long, short = ((one.forward + one.backward) / size for one in passes)
        by_pair = (long - short) / (shapes[0].computed().pairs - shapes[1].computed().pairs)
        fixed = short - by_pair * shapes[1].computed().pairs
        keys = 4 * LENGTH * language.num_key_value_heads * language.head_dim / tp
        rate = link_rate(hardware, size * tp) if one_adapter else ring_rate(hardware, size, tp)
        once = keys * (size - 1) / size / rate + hardware.latency if size > 1 else 0.0
        return Seconds(fixed, by_pair, once * PASSES_WITH_EXCHANGE * language.num_hidden_layers)

    def of_pack(self, pack: Pack, size: int) -> float:
        return self.fixed + self.by_pair * pack.pairs[size] + self.exchange


Table = dict[int, Seconds]  # by the size of a group
Way = Callable[[Sequence[Pack], Table], float]  # packs of a step -> seconds of its slowest rank


def dealt(packs: Sequence[Pack], table: Table, size: int = 1) -> float:
    """Whole packs for groups of one size, as many for each: today's dealing, with ``cp`` = size."""
    return max(
        sum(table[size].of_pack(packs[i], size) for i in own)
        for own in balance_ranks([pack.work.shared for pack in packs], RANKS // size)
    )


def uneven(packs: Sequence[Pack], table: Table) -> float:
    """Whole packs, costliest first, for whoever has least: some ranks get more packs than others."""
    loads = [0.0] * RANKS
    for pack in sorted(packs, key=lambda pack: -pack.work.shared):
        loads[loads.index(min(loads))] += table[1].of_pack(pack, 1)
    return max(loads)


def shared(packs: Sequence[Pack], table: Table, size: int) -> float:
    """Packs dealt to replicas of ``size`` ranks, each by as many of them as balance the step (``least_cp: 1``)."""
    slowest = 0.0
    for replica in balance_ranks([pack.work.shared for pack in packs], RANKS // size):
        own = [packs[i] for i in replica]
        shares = share_packs([pack.work for pack in own], size)
        times = [table[len(group)].of_pack(pack, len(group)) for pack, group in zip(own, shares, strict=True)]
        slowest = max(slowest, *rank_times(times, shares, size))
    return slowest


def by_cost(packs: Sequence[Pack], table: Table) -> float:
    """No packs at all: whole samples dealt to ranks by cost, whatever tokens a rank gets. No packing rule beats it."""
    loads = [0.0] * RANKS
    each = table[1].fixed / LENGTH
    for tokens in sorted((n for pack in packs for n in pack.segments), reverse=True):
        loads[loads.index(min(loads))] += each * tokens + table[1].by_pair * tokens * (tokens + 1) / 2
    return max(loads)


WAYS: dict[str, Way] = {
    "today: whole packs, dealt by cost": dealt,
    "whole packs, uneven numbers": uneven,
    "whole samples of equal cost a rank": by_cost,
    **{f"cp={size} for every pack": partial(dealt, size=size) for size in SIZES[1:]},
    **{f"cp={size}, least_cp=1": partial(shared, size=size) for size in SIZES[1:]},
}


def steps_of(rule: str, each: int) -> list[list[Pack]]:
    """Packs of STEPS steps, ``each`` a rank."""
    tokens = lognormal_lengths(SAMPLES, MEDIAN, SIGMA, LENGTH)
    found = pack_samples(rule, tokens, LENGTH, spare=int(tokens.sum()) // LENGTH // 500).packs
    order = np.random.default_rng(0).permutation(len(found))[: STEPS * RANKS * each]
    packs = []
    for number in order:
        segments = tokens[found[number]].tolist()
        padding = LENGTH - sum(segments)
        packs.append(Pack.of([*segments, padding] if padding else segments))
    return [packs[first : first + RANKS * each] for first in range(0, len(packs), RANKS * each)]


def choosing() -> None:
    """Prints what choosing the groups of one step costs a process, by packs that share 8 ranks."""
    lengths = lognormal_lengths(CHOSEN[-1], MEDIAN, SIGMA, LENGTH)
    print("\n| packs of a replica's step | choosing, ms |\n|---|---|")
    for count in CHOSEN:
        packs = [PackWork.of_segments((int(n),), 0, PARITY, 0.0) for n in lengths[:count]]
        begun = time.process_time()
        share_packs(packs, 8)
        print(f"| {count} | {1000 * (time.process_time() - begun):.1f} |", flush=True)


def main() -> None:
    """Prints a table a packing rule, number of packs and tensor parallelism, and what choosing costs."""
    for rule in ("balanced", "best_fit"):
        for each in (1, 4):
            steps = steps_of(rule, each)
            for tp, one_adapter in ((1, False), (4, False), (4, True)):
                table = {size: Seconds.of(tp, size, one_adapter) for size in SIZES}
                print(f"\n{rule}, {each} a rank, {RANKS} ranks of tp={tp}{', one adapter a rank' * one_adapter}\n")
                print(
                    "| | slowest / mean | worst of steps | us a token and GPU | against today |\n|---|---|---|---|---|"
                )
                today = 0.0
                for name, way in WAYS.items():
                    seconds = [way(packs, table) for packs in steps]
                    means = [sum(table[1].of_pack(pack, 1) for pack in packs) / RANKS for packs in steps]
                    ratios = np.array(seconds) / np.array(means)
                    per_token = 1e6 * float(np.mean(seconds)) * tp / (each * LENGTH)
                    today = today or per_token
                    cells = f"{ratios.mean():.3f} | {ratios.max():.3f} | {per_token:.1f} | {per_token / today - 1:+.0%}"
                    print(f"| {name} | {cells} |", flush=True)
                mean = float(np.mean([table[1].of_pack(pack, 1) for pack in steps[0]]))
                parts = ", ".join(f"{size}: {seconds.exchange / mean:.2%}" for size, seconds in table.items())
                print(f"\nexchange of a rank, in a pack's mean time on one rank, by size of the group: {parts}")
    choosing()


if __name__ == "__main__":
    main()
