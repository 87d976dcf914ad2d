"""Naming a slow process: what it costs and what it finds, by the number of processes.

    python benchmarks/stragglers.py

Cost: rank 0's judgement over made-up measurements of 8 to 32 768 processes, the bytes that are gathered, and one
measurement in real processes of this machine. Finding: in runs that are as uneven as ``ordinary`` says - made up, for
no cluster was there - one process turns slow by a share; how many of the trials name it and it alone within 50 steps,
and how many measurements of runs without a slow one name anybody. Beside it what one would write first: whoever is
further from the mean of the newest measurement than three standard deviations.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_eagle.training.stragglers import COMPUTING, DEVICE, EVERY, KINDS, WINDOW, find_stragglers

Array = NDArray[np.float64]
Finder = Callable[[Array], set[int]]

SIZES = (8, 64, 512, 4096, 32_768)
STAGES, STEP = 4, 2.0
SHARES = (1.2, 1.3, 1.5, 2.0)  # how slow, of the usual
TRIALS, ORDINARY = 100, 200
PROCESSES = (4, 8)


def ordinary(rng: np.random.Generator, many: int, ranks: int) -> Array:
    """[many, ranks, KINDS] seconds: each number uneven by 5 %, one in a hundred up to five times too large, and a first
    pipeline stage that computes half as much again."""
    usual = np.array([1e-3, 5e-4, 0.02, 1.2])
    found: Array = usual * rng.lognormal(0, 0.05, (many, ranks, len(KINDS)))
    found *= np.where(rng.random(found.shape) < 0.01, rng.uniform(1, 5, found.shape), 1.0)
    found[:, np.arange(ranks) % STAGES == 0, KINDS.index(COMPUTING)] *= 1.5
    return found


def ours(window: Array) -> set[int]:
    """As the run does."""
    peers = (np.arange(window.shape[1]) % STAGES).astype(float)
    return {one.rank for one in find_stragglers(window, np.full(len(window), STEP), peers)}


def three_deviations(window: Array) -> set[int]:
    """Of the newest measurement, each pipeline stage by itself."""
    found: set[int] = set()
    for stage in range(STAGES):
        values = window[-1, stage::STAGES]
        far = (values > values.mean(0) + 3 * values.std(0)).any(1)
        found |= {stage + STAGES * int(number) for number in np.flatnonzero(far)}
    return found


def windows(found: Array) -> Iterator[Array]:
    """What is looked at after each measurement."""
    for end in range(WINDOW, len(found) + 1):
        yield found[end - WINDOW : end]


def named(finder: Finder, rng: np.random.Generator, ranks: int, share: float) -> tuple[bool, int | None]:
    """(whether nobody else was named, steps until the slow one was, None if never) within 50 steps of turning slow."""
    found, rank = ordinary(rng, 2 * WINDOW, ranks), int(rng.integers(ranks))
    found[WINDOW:, rank, KINDS.index(DEVICE)] *= share
    alone, after = True, None
    for number, window in enumerate(list(windows(found))[1:], 1):
        seen = finder(window)
        alone &= seen <= {rank}
        if rank in seen and after is None:
            after = number * EVERY
    return alone, after


def finding(name: str, finder: Finder, ranks: int) -> str:
    """The row of one way and size."""
    rng = np.random.default_rng(ranks)
    quiet = sum(bool(finder(window)) for window in windows(ordinary(rng, ORDINARY + WINDOW - 1, ranks)))
    cells = []
    for share in SHARES:
        trials = [named(finder, rng, ranks, share) for _ in range(TRIALS)]
        steps = [after for alone, after in trials if alone and after is not None]
        cells.append(f"{len(steps)}, {statistics.median(steps):.0f}" if steps else "0")
    return f"| {name} | {ranks} | {quiet} of {ORDINARY} | {' | '.join(cells)} |"


def judging(ranks: int) -> str:
    """The row of one size."""
    window = ordinary(np.random.default_rng(0), WINDOW, ranks)
    times = []
    for _ in range(9):
        begun = time.perf_counter()
        ours(window)
        times.append(time.perf_counter() - begun)
    return f"| {ranks} | {1000 * statistics.median(times):.1f} | {ranks * len(KINDS) * 8 / 1024:,.1f} |"


def measured(times: int) -> float:
    """Runs in every process of a world: median seconds of one measurement, gathering and judging included."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.layout import Layout
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.stragglers import StragglerWatch

    platform = install()
    torch.set_num_threads(1)
    watch = StragglerWatch(initialise(Layout(), platform, timeout=timedelta(minutes=1)), platform.device)
    seconds = []
    for number in range(1, times + 1):
        begun = time.perf_counter()
        watch.after_step(EVERY * number, 1.0)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def main() -> None:
    """Prints the tables."""
    from megatron_eagle.parallel.process_pool import World

    print("| ranks | judging, ms | gathered, KiB |\n|---|---|---|")
    for ranks in SIZES:
        print(judging(ranks), flush=True)
    print(f"\n| processes here | a measurement, every {EVERY} steps, ms |\n|---|---|")
    for processes in PROCESSES:
        world = World(processes)
        try:
            print(f"| {processes} | {1000 * max(world.run(measured, 60)):.1f} |", flush=True)
        finally:
            world.stop()
    shares = " | ".join(f"{share} x" for share in SHARES)
    print(f"\n| | ranks | names somebody without a slow one | {shares} |\n|---|---|---|{'---|' * len(SHARES)}")
    for name, finder in (("three deviations", three_deviations), ("ours", ours)):
        for ranks in SIZES[:-1]:
            print(finding(name, finder, ranks), flush=True)


if __name__ == "__main__":
    main()
