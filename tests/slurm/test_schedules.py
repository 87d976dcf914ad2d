"""Random schedules of faults: a chain ends complete with equal losses, or stopped with the true cause in ``status``.

Ten chains at once on one throw-away Slurm, each with faults of its own drawn from its number, some of them for all:
a wave. The trainer is the stand-in; Slurm, batch scripts, signals, the supervisor and the hang watch are real.
"""

import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import yaml
from chain import ROOT, STAGES, SubmittedChain, losses, profile, small_recipe, stand_in_python, submit
from stand_in import expected_losses
from test_faults import drain_node, hang_rank, kill_rank, lose_node, requeue, signal_batch, signal_ranks
from throwaway import ThrowawaySlurm

from megatron_eagle.cluster.queueing import cancel_run
from megatron_eagle.cluster.status import CANCELLED, COMPLETE, GAVE_UP, read_status

CHAINS = 10
STEPS = 40
HANG = {"factor": 20, "at_least": 5, "otherwise": 60, "grace": 1}
RESTARTS = {"failures": 5, "without_progress": 3}
Fault = Callable[[SubmittedChain, str, random.Random], None]


def stop_at_the_start(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    """TERM as soon as a start of the job begins: note, imports or pre-flight."""
    chain.slurm.run("scontrol", "requeue", job, check=False)
    chain.slurm.until(lambda: chain.slurm.state(job) == "RUNNING" or chain.is_over(), f"{job} runs again", 60)
    time.sleep(random_.uniform(0, 1.5))
    chain.slurm.run("scancel", "--signal=TERM", "--batch", job, check=False)


def suspend(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    """For longer than a step may take."""
    chain.slurm.run("scontrol", "suspend", job, check=False)
    time.sleep(HANG["at_least"] + 2)
    chain.slurm.run("scontrol", "resume", job, check=False)


def hold_and_release(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    chain.slurm.run("scontrol", "requeuehold", job, check=False)
    time.sleep(1)
    chain.slurm.run("scontrol", "release", job, check=False)


def tear_lines(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    """What a full disk or a lost node leaves of a line, in both files."""
    for name in ("events.jsonl", "metrics.jsonl"):
        with (chain.folder / name).open("ab") as file:
            file.write(random_.choice([b'{"stage": "st', b"\0" * 40, b'{"event": "submit', b"17}"]))


def cancel(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    with mock.patch.dict(os.environ, chain.slurm.environment):
        cancel_run(chain.folder)


def slurmd_dies(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    """Slurm takes the node for lost; its ranks train on until the next start."""
    node = random_.choice(chain.slurm.nodes)
    chain.slurm.kill_slurmd(node)
    time.sleep(2)
    chain.slurm.start_node(node)


def controller_away(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    """Ended in order: with kill -9 Slurm forgets what it was told last, and takes a job that is over for suspended."""
    chain.slurm.daemons["slurmctld"].terminate()
    chain.slurm.daemons.pop("slurmctld").wait()
    time.sleep(random_.uniform(1, 5))
    chain.slurm.start_controller()


# Fault -> what ``status`` may name as the cause, where it comes to the end of a chain's budget.
OWN: dict[Fault, str] = {
    requeue: "ended from outside",
    signal_ranks: "asked to stop",
    signal_batch: "asked to stop",
    kill_rank: "Killed",
    hang_rank: "hang",
    stop_at_the_start: "asked to stop|ended from outside",
    suspend: "^$",  # blames nobody
    hold_and_release: "ended from outside",
    tear_lines: "^$",
    cancel: "cancelled",
}
EVERYBODYS: dict[Fault, str] = {
    controller_away: "^$",
    lose_node: "ended from outside|node",
    slurmd_dies: "ended from outside|node",
    drain_node: "asked to stop",
}


def apply(fault: Fault, chain: SubmittedChain, job: str, random_: random.Random) -> None:
    """An operator's command that Slurm lets wait (scancel of a job whose node is gone) is no fault of the chain's."""
    try:
        fault(chain, job, random_)
    except subprocess.TimeoutExpired:
        for node in chain.slurm.nodes:
            chain.slurm.run("scontrol", "update", f"NodeName={node}", "State=resume", check=False)


@dataclass
class Scheduled:
    """One chain. due: (second, fault) in order; causes: of what has been done to it."""

    chain: SubmittedChain
    random_: random.Random
    due: list[tuple[float, Fault]]
    causes: list[str] = field(default_factory=list)

    def disturb(self, fault: Fault, cause: str) -> None:
        """If a job of the chain runs."""
        running = [job for job in self.chain.jobs.values() if self.chain.slurm.state(job) == "RUNNING"]
        if running:
            self.causes.append(cause)
            apply(fault, self.chain, running[0], self.random_)


@pytest.fixture
def wide() -> Iterator[ThrowawaySlurm]:
    """Two nodes on which ten chains run at once."""
    with ThrowawaySlurm.start(nodes=2, cpus=4 * CHAINS) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def recipe_and_cluster(small_run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("schedules")
    recipe = small_recipe(small_run, folder / "recipe.yaml", steps=STEPS, checkpoint_every=10)
    settings = {"python": str(stand_in_python(folder)), "hang": HANG, "restarts": RESTARTS}
    return recipe, profile(folder / "cluster.yaml", environment={"PYTHONPATH": str(ROOT)}, **settings)


@pytest.mark.long
def test_a_rank_that_hangs_after_its_last_step(wide: ThrowawaySlurm, small_run, tmp_path: Path) -> None:
    """The schedules' finding: the others end well, and Slurm would wait for it up to the time limit."""
    recipe = small_recipe(small_run, tmp_path / "recipe.yaml", steps=10)
    environment = {"PYTHONPATH": str(ROOT), "STAND_IN_STAYS": "3"}
    settings = {"python": str(stand_in_python(tmp_path)), "hang": HANG | {"otherwise": 6}, "environment": environment}
    chain = submit(wide, recipe, profile(tmp_path / "cluster.yaml", **settings), tmp_path, "--stages", "stage1")
    assert chain.wait() == {"stage1": "COMPLETED"}, chain.logs()
    (only,) = chain.events("ended")
    assert (only["outcome"], only["step"]) == ("complete", 10), chain.logs()
    assert "reached its end; after it rank 3 on node n2" in only["cause"]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("wave", "stages", "most"),
    [
        pytest.param(0, STAGES[:1], 1, id="seeds-0-9", marks=pytest.mark.slow),
        *(pytest.param(wave, STAGES, 4, id=f"seeds-{wave}0-{wave}9", marks=pytest.mark.long) for wave in range(1, 11)),
    ],
)
def test_every_schedule_ends_well_or_says_why(
    wide: ThrowawaySlurm,
    recipe_and_cluster: tuple[Path, Path],
    tmp_path: Path,
    wave: int,
    stages: tuple[str, ...],
    most: int,
) -> None:
    """Up to ``most`` faults a chain; with more than one also some that hit all."""
    scheduled = []
    wide.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # they begin together
    for seed in range(wave * CHAINS, (wave + 1) * CHAINS):
        random_ = random.Random(seed)
        chain = submit(wide, *recipe_and_cluster, tmp_path / str(seed), "--stages", ",".join(stages))
        faults = random_.choices(list(OWN), k=random_.randint(1, most))
        due = sorted(((random_.uniform(2, 4 + 12 * (most > 1)), fault) for fault in faults), key=lambda entry: entry[0])
        scheduled.append(Scheduled(chain, random_, due))
    wide.run("scontrol", "update", "PartitionName=main", "State=UP")
    everybodys = random.Random(wave).choices(list(EVERYBODYS), k=2) if most > 1 else [controller_away]
    run_schedules(wide, scheduled, everybodys)

    def all_over() -> bool:
        resume_drained(wide)
        return all(one.chain.is_over() for one in scheduled)

    wide.until(all_over, f"the end of wave {wave}", 900, 0.5)
    stages_of = {stage["name"]: stage for stage in yaml.safe_load(recipe_and_cluster[0].read_text())["stages"]}
    expected = expected_losses([stages_of[name] for name in stages])
    wrong = [said for one in scheduled if (said := judge(one, expected))]
    assert not wrong, "\n".join(wrong)
    wide.until(lambda: wide.processes() == [], "no process left behind", 30)


def run_schedules(slurm: ThrowawaySlurm, scheduled: list[Scheduled], everybodys: list[Fault]) -> None:
    started = time.monotonic()
    plan = [(second, fault, one) for one in scheduled for second, fault in one.due]
    plan += [(4.0 + 8 * number, fault, None) for number, fault in enumerate(everybodys)]
    for second, fault, only in sorted(plan, key=lambda entry: entry[0]):
        slurm.until(lambda: time.monotonic() >= started + second, "its time", 60)  # noqa: B023
        if only is not None:
            only.disturb(fault, OWN[fault])
            continue
        for one in scheduled:
            one.causes.append(EVERYBODYS[fault])
        apply(fault, scheduled[0].chain, next(iter(scheduled[0].chain.jobs.values())), scheduled[0].random_)


def resume_drained(slurm: ThrowawaySlurm) -> None:
    """The operator's part (docs/slurm.md): a slurmd that was killed may come back, and be given the job's next start,
    while the script of the one before is still there; Slurm then drains the node and holds the job."""
    for line in slurm.run("sinfo", "--noheader", "--list-reasons", "--format=%n %E").splitlines():
        node, _, why = line.partition(" ")
        if why == "Duplicate jobid":
            slurm.run("scontrol", "update", f"NodeName={node}", "State=resume")
    for line in slurm.run("squeue", "--noheader", "--states=PENDING", "--format=%i %r").splitlines():
        job, _, why = line.partition(" ")
        if why.startswith("launch failed"):
            slurm.run("scontrol", "release", job)


def judge(one: Scheduled, expected: list[tuple[str, int, float, str]]) -> str:
    """What is wrong with how the chain ended; empty if nothing is."""
    with mock.patch.dict(os.environ, one.chain.slurm.environment):
        rows = read_status(one.chain.folder)
    name = f"seed {one.chain.runs.name} ({', '.join(fault.__name__ for _, fault in one.due)})"
    found = losses(one.chain.runs)
    if all(row.state == COMPLETE for row in rows):
        return "" if found == expected else f"{name}: other losses\n{one.chain.logs()}"
    if found != expected[: len(found)]:
        return f"{name}: other losses before it stopped\n{one.chain.logs()}"
    end = next(row for row in rows if row.state != COMPLETE)
    if end.state == CANCELLED and "cancelled" in one.causes:
        return ""
    if end.state == GAVE_UP and any(re.search(cause, end.why) for cause in one.causes if cause != "^$"):
        return ""
    return f"{name}: {end.stage} is '{end.state}' because of '{end.why}'\n{one.chain.logs()}"
