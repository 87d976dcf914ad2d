"""A slow process is named within 50 steps, and none in a run that is only as uneven as runs are."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import SmallRun
from train_cases import train

from megatron_eagle.cluster.events import read_events, slow_nodes, stragglers
from megatron_eagle.training.stragglers import (
    COMPUTING,
    DEVICE,
    EVERY,
    FEWEST,
    HOST,
    KINDS,
    READING,
    WINDOW,
    find_stragglers,
)

RANKS, STAGES, STEP = 1024, 4, 2.0
STEADY = np.ones(WINDOW) * STEP


def measurements(rng: np.random.Generator, many: int, ranks: int = RANKS) -> np.ndarray:
    """[many, ranks, KINDS] of an ordinary run: every kind uneven by 5 %, one number in a hundred up to five times too
    large, a first pipeline stage that computes more, reading that mostly waits for nothing, and every eighth reads."""
    usual = np.array([1e-3, 5e-4, 0.02, 1.2])
    found = usual * rng.lognormal(0, 0.05, (many, ranks, len(KINDS)))
    found *= np.where(rng.random(found.shape) < 0.01, rng.uniform(1, 5, found.shape), 1.0)
    first = np.arange(ranks) % STAGES == 0
    found[:, first, KINDS.index(COMPUTING)] *= 1.5
    found[:, np.arange(ranks) % 8 != 0, KINDS.index(READING)] = np.nan
    return found


PEERS = (np.arange(RANKS) % STAGES).astype(float)


def test_a_run_without_a_slow_process_names_none() -> None:
    rng = np.random.default_rng(1)
    windows = [find_stragglers(measurements(rng, WINDOW), STEADY, PEERS) for _ in range(60)]
    assert not any(windows)  # 60 windows of 1 024 processes and four kinds


@pytest.mark.parametrize(("kind", "slower"), [(DEVICE, 1.4), (HOST, 1.6), (READING, 40.0), (COMPUTING, 1.5)])
def test_a_slow_process_is_named_within_50_steps(kind: str, slower: float) -> None:
    rng = np.random.default_rng(2)
    for rank in (0, 8, 504, 1016):
        found = measurements(rng, 2 * WINDOW)
        found[WINDOW:, rank, KINDS.index(kind)] *= slower
        named = [
            [(one.rank, one.kind) for one in find_stragglers(found[end - WINDOW : end], STEADY, PEERS)]
            for end in range(WINDOW, 2 * WINDOW + 1)
        ]
        assert named[0] == [] and named[-1] == [(rank, kind)]
        assert EVERY * named.index([(rank, kind)]) <= 50


def test_one_slow_step_names_nobody() -> None:
    found = measurements(np.random.default_rng(3), WINDOW)
    found[2:4, 17] *= 50
    assert find_stragglers(found, STEADY, PEERS) == []


def test_too_few_to_compare_are_not_compared() -> None:
    found = measurements(np.random.default_rng(4), WINDOW, ranks=FEWEST - 1)
    found[:, 1] *= 10
    assert find_stragglers(found, STEADY, np.zeros(FEWEST - 1)) == []


def slowed(slow: int, steps: int) -> list[Any]:
    """Runs in every process of a world: ``steps`` measurements, of a device that takes 500 times as long on one."""
    import torch.distributed as dist

    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.layout import Layout
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training import stragglers

    platform = install()
    groups = initialise(Layout(), platform, timeout=timedelta(minutes=1))
    watch = stragglers.StragglerWatch(groups, platform.device)
    usual, side = dict(stragglers.PRODUCT), stragglers.PRODUCT["cpu"][0]
    found = []
    for step in range(1, steps + 1):
        late = groups.rank == slow and step <= steps // 2
        stragglers.PRODUCT["cpu"] = (side, 500) if late else usual["cpu"]
        found += [(step, str(one), one.values()) for one in watch.after_step(step, 1.0)]
    stragglers.PRODUCT.update(usual)
    dist.barrier()
    return found


def test_eight_processes_name_the_slow_one_and_take_it_back(worlds: Any) -> None:
    first, *others = worlds(8).run(slowed, 5, 4 * WINDOW * EVERY)
    assert others == [[]] * 7
    # On a machine with fewer cores than processes others may be slow, too, and are then named.
    ours = [(step, said, values) for step, said, values in first if values["rank"] == 5]
    step, said, values = ours[0]
    assert step == WINDOW * EVERY <= 50 and values["kind"] == DEVICE and values["alone"] and values["ratio"] > 10
    assert any(not values["slow"] and step > 2 * WINDOW * EVERY for step, _, values in ours), first
    assert said.startswith("rank 5 on ") and " is slow: device " in said


def test_the_run_says_so_and_its_next_start_leaves_the_node_out(
    small_run: SmallRun, worlds: Any, tmp_path: Path
) -> None:
    settings = small_run.settings()
    settings["stages"][0] |= {"batch": 4, "steps": 6}
    recipe = small_run.write_recipe(tmp_path / "recipe.yaml", stages=settings["stages"])
    worlds(4).run(train_slowed, str(recipe), str(tmp_path / "runs"))
    run = tmp_path / "runs" / "small"
    # On a machine with fewer cores than processes others may be slow, too.
    events = [event for event in read_events(run) if event.get("rank", 2) == 2]
    assert [(one["rank"], one["stage"], one["kind"]) for one in stragglers(events, "first")] == [(2, "first", DEVICE)]
    assert slow_nodes(events, "first") == [events[-1]["node"]] and slow_nodes(events, "second") == []
    over = {"event": "straggler", "stage": "first", "rank": 2, "slow": False}
    again = {"event": "started", "stage": "first"}
    assert slow_nodes([*events, over], "first") == slow_nodes([*events, again], "first") == []


def train_slowed(recipe: str, runs: str) -> None:
    """Runs in every process of a world: a stage in which rank 2's device is slow and all are looked at every step."""
    import torch.distributed as dist

    from megatron_eagle.training import stragglers

    own = {"EVERY": 1, "WINDOW": 3} | ({"PRODUCT": {"cpu": (128, 2000)}} if dist.get_rank() == 2 else {})
    before = {name: getattr(stragglers, name) for name in own}
    try:
        vars(stragglers).update(own)
        train(recipe, "first", runs)
    finally:
        vars(stragglers).update(before)
