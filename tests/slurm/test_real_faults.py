"""The real trainer under faults: every chain arrives with the losses of a run without Slurm, or stops and says why.

``test_faults.py`` has many more faults, with a stand-in for the trainer; ``test_chain.py`` kills a real process in the
normal run.
"""

import json
import os
import random
import shutil
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import ROOT, STAGES, Losses, SubmittedChain, losses, profile, small_recipe, submit, without_slurm
from small_disk import small_disk
from small_run import SmallRun
from test_faults import (
    Fault,
    drain_node,
    hang_rank,
    kill_rank,
    lose_node,
    nothing_left,
    requeue,
    signal_batch,
    signal_ranks,
)
from throwaway import ThrowawaySlurm

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

STEPS = 16
EVERY = 4
TOO_LONG = 200  # seconds of training, with at most 65 in one start
STUCK = """
import signal, time

def stuck_here(number, frame):
    time.sleep(600)

signal.signal(signal.SIGUSR2, stuck_here)  # a rank that gets this never comes back to its step
"""


@pytest.fixture(scope="module")
def long_recipe(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long_recipe") / "recipe.yaml"
    return small_recipe(small_run, path, steps=STEPS, checkpoint_every=EVERY)


@pytest.fixture(scope="module")
def undisturbed_runs(long_recipe: Path, worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    without_slurm(long_recipe, runs, worlds)
    return runs


@pytest.fixture(scope="module")
def undisturbed(undisturbed_runs: Path) -> Losses:
    return losses(undisturbed_runs)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    (tmp_path / "sitecustomize.py").write_text(STUCK)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "GLOO_SOCKET_IFNAME": "lo"}
    return profile(tmp_path / "cluster.yaml", environment=environment)


def stuck_rank(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    """It lives, but never ends its step."""
    ranks = chain.slurm.ranks(job)
    os.kill(ranks[random_.choice(sorted(ranks))], signal.SIGUSR2)


def kill_while_saving(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    stage = next(stage for stage, number in chain.jobs.items() if number == job)
    folder = chain.folder / "checkpoints" / stage
    chain.slurm.until(lambda: any(folder.glob("*.partial")), "a checkpoint being written", 60, 0.01)
    kill_rank(chain, job, random_)


def no_saved_step_is_lost(chain: SubmittedChain) -> None:
    """Every start of a stage begins where the one before had saved."""
    for stage in STAGES:
        starts = [event["step"] for event in chain.events("started") if event["stage"] == stage]
        ends = [event["step"] for event in chain.events("ended") if event["stage"] == stage]
        assert starts == [0, *ends[:-1]] and ends == sorted(ends) and ends[-1] == STEPS, (stage, starts, ends)


@pytest.mark.parametrize(
    ("faults", "causes"),
    [
        (
            (requeue, signal_ranks, signal_batch),
            ("ended from outside without a word", "asked to stop", "asked to stop"),
        ),
        (
            (kill_rank, hang_rank, stuck_rank),
            ("Killed", "hang: the others waited for rank", "at stuck_here (sitecustomize.py:5)"),
        ),
        ((lose_node, drain_node, kill_while_saving), ("ended from outside without a word", "asked to stop", "Killed")),
    ],
    ids=lambda value: ", ".join(fault.__name__ for fault in value) if callable(value[0]) else "",
)
def test_a_fault_in_each_stage_changes_no_loss(
    slurm: ThrowawaySlurm,
    long_recipe: Path,
    cluster: Path,
    undisturbed: Losses,
    tmp_path: Path,
    faults: tuple[Fault, ...],
    causes: tuple[str, ...],
) -> None:
    chain = submit(slurm, long_recipe, cluster, tmp_path)
    at: dict[str, int] = {}
    for stage, fault in zip(STAGES, faults, strict=True):
        chain.until_step(stage, EVERY + 2)
        at[stage] = chain.step(stage)
        fault(chain, chain.jobs[stage], random.Random(2))
    assert chain.wait(1200) == dict.fromkeys(STAGES, "COMPLETED"), chain.logs()
    assert losses(tmp_path) == undisturbed
    no_saved_step_is_lost(chain)
    for stage, fault, cause in zip(STAGES, faults, causes, strict=True):
        first, *rest = [event for event in chain.events("ended") if event["stage"] == stage]
        assert cause in first["cause"] and [event["outcome"] for event in rest] == ["complete"], chain.logs()
        assert first["step"] >= (at[stage] if "asked" in cause else EVERY), "an orderly stop saves the step it was at"
        if fault in (hang_rank, stuck_rank):
            stacks = {file.stem: file.read_text() for file in (chain.folder / "jobs" / "stacks").glob(f"{stage}-*/*")}
            dumped = [name for name, text in stacks.items() if "Timeout (" in text]
            assert len(stacks) == 4 and len(dumped) >= (4 if fault is stuck_rank else 3), stacks
            assert fault is hang_rank or any("in stuck_here" in text for text in stacks.values())
    nothing_left(chain)


def test_a_time_limit_too_short_for_a_stage(
    slurm: ThrowawaySlurm, small_run: SmallRun, undisturbed_runs: Path, worlds, tmp_path: Path
) -> None:
    """Slurm's own clock: two minutes a start, asked to stop a minute before; the second stage takes longer.

    How many steps that is depends on the machine, and how busy it is.
    """
    lines = (undisturbed_runs / "small" / "metrics.jsonl").read_text().splitlines()
    seconds = statistics.median(entry["seconds"] for entry in map(json.loads, lines) if entry["stage"] != "stage1")
    steps = (2, max(100, round(TOO_LONG / seconds)), 2)
    recipe = small_recipe(small_run, tmp_path / "recipe.yaml", steps=steps, checkpoint_every=1000)
    expected = without_slurm(recipe, tmp_path / "plain", worlds)
    restarts = {"failures": 0, "without_progress": 6}  # a busy machine may not even get to its first step in a minute
    short = profile(tmp_path / "short.yaml", time_limit="2", stop_seconds=60, restarts=restarts)
    chain = submit(slurm, recipe, short, tmp_path / "runs")
    assert chain.wait(1500) == dict.fromkeys(STAGES, "COMPLETED"), chain.logs()
    assert losses(tmp_path / "runs") == expected
    outcomes = [event["outcome"] for event in chain.events("ended") if event["stage"] == "stage1.5"]
    assert outcomes[-1] == "complete" and len(outcomes) >= 3 and set(outcomes[:-1]) == {"stopped"}, outcomes
    nothing_left(chain)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of sixteen megabytes."""
    with small_disk(tmp_path / "disk", megabytes=16) as folder:
        yield folder


def test_a_full_disk_stops_the_chain_and_room_lets_it_go_on(
    slurm: ThrowawaySlurm, long_recipe: Path, cluster: Path, undisturbed: Losses, disk: Path
) -> None:
    chain = submit(slurm, long_recipe, cluster, disk)
    chain.slurm.until(lambda: chain.saved("stage1.5") >= EVERY, "a checkpoint of stage1.5", 300, 0.02)
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
    assert chain.wait(300) == {"stage1": "COMPLETED", "stage1.5": "FAILED", "stage2": "CANCELLED"}
    (given_up,) = chain.events("gave_up")
    assert "the disk is full" in given_up["cause"] and len(chain.events("started")) == 2, chain.events("started")
    nothing_left(chain)
    saved = chain.saved("stage1.5")
    assert saved >= EVERY
    filler.unlink()
    again = submit(slurm, long_recipe, cluster, disk, "--stages", "stage1.5,stage2")
    assert again.wait(600) == {"stage1.5": "COMPLETED", "stage2": "COMPLETED"}, again.logs()
    assert losses(disk) == undisturbed
    assert again.events("started")[2]["step"] == saved, "nothing that was saved is computed again"
    nothing_left(again)
