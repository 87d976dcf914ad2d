"""Chains under faults: each arrives with the losses of a run without faults, or stops and says why.

Here the trainer is the stand-in of ``stand_in.py``; Slurm, batch script, signals, supervisor and hang watch are real.
``test_chain.py`` has some with the real trainer.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from chain import STAGES, SubmittedChain, losses, profile, small_recipe, stand_in_python, submit
from small_disk import small_disk
from stand_in import expected_losses
from throwaway import ThrowawaySlurm

# Minutes of real Slurm time: make test-long. The chain of three stages runs in make test.
pytestmark = pytest.mark.long

HANG = {"factor": 20, "at_least": 3, "otherwise": 30, "grace": 1}
STEPS = 40


@pytest.fixture(scope="module")
def stand_in(small_run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Recipe and cluster profile."""
    folder = tmp_path_factory.mktemp("stand_in")
    recipe = small_recipe(small_run, folder / "recipe.yaml", steps=STEPS, checkpoint_every=10)
    python = str(stand_in_python(folder))
    restarts = {"failures": 5, "without_progress": 3}
    return recipe, profile(folder / "cluster.yaml", python=python, hang=HANG, restarts=restarts)


@pytest.fixture
def chain(slurm: ThrowawaySlurm, stand_in: tuple[Path, Path], tmp_path: Path) -> SubmittedChain:
    return submit(slurm, *stand_in, tmp_path)


@pytest.fixture
def expected(stand_in: tuple[Path, Path]) -> list:
    return expected_losses(yaml.safe_load(stand_in[0].read_text())["stages"])


def submit_with(slurm: ThrowawaySlurm, stand_in: tuple[Path, Path], runs: Path, **variables: str) -> SubmittedChain:
    """Submit with further environment variables for the stand-in."""
    recipe, cluster = stand_in
    settings = yaml.safe_load(cluster.read_text())
    settings["environment"] |= variables
    return submit(slurm, recipe, profile(cluster.with_name("changed.yaml"), **settings), runs)


def requeue(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    chain.slurm.run("scontrol", "requeue", job, check=False)


def signal_ranks(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    chain.slurm.run("scancel", "--signal=USR1", job, check=False)


def signal_batch(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    """What the time limit does."""
    chain.slurm.run("scancel", "--signal=USR1", "--batch", job, check=False)


def kill_rank(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    send_to_a_rank(chain, job, random_, signal.SIGKILL)


def hang_rank(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    send_to_a_rank(chain, job, random_, signal.SIGSTOP)


def send_to_a_rank(chain: SubmittedChain, job: str, random_: random.Random, number: signal.Signals) -> None:
    ranks = chain.slurm.ranks(job)
    if ranks:
        try:
            os.kill(ranks[random_.choice(sorted(ranks))], number)
        except ProcessLookupError:
            return


def lose_node(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    node = random_.choice(chain.slurm.nodes)
    chain.slurm.kill_node(node)
    chain.slurm.until(lambda: chain.slurm.state(job) != "RUNNING", f"{job} ended by the loss of {node}", 60)
    chain.slurm.start_node(node)


def drain_node(chain: SubmittedChain, job: str, random_: random.Random) -> None:
    """The job goes on, is stopped, and can only start again when the node is back."""
    node = random_.choice(chain.slurm.nodes)
    chain.slurm.run("scontrol", "update", f"NodeName={node}", "State=drain", "Reason=test")
    signal_batch(chain, job, random_)
    chain.slurm.until(lambda: chain.slurm.state(job) != "RUNNING", f"{job} stopped", 60)
    time.sleep(1)
    chain.slurm.run("scontrol", "update", f"NodeName={node}", "State=resume", check=False)


Fault = Callable[[SubmittedChain, str, random.Random], None]
FAULTS: list[Fault] = [requeue, signal_ranks, signal_batch, kill_rank, hang_rank, lose_node, drain_node]


def arrives(chain: SubmittedChain, expected: list, seconds: float = 120) -> None:
    assert chain.wait(seconds) == dict.fromkeys(STAGES, "COMPLETED"), chain.logs()
    assert losses(chain.runs) == expected
    nothing_left(chain)


def nothing_left(chain: SubmittedChain) -> None:
    chain.slurm.until(lambda: chain.slurm.processes() == [], "no process left behind", 15)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (requeue, "ended from outside without a word"),
        (signal_ranks, "asked to stop"),
        (signal_batch, "asked to stop"),
        (kill_rank, "Killed"),
        (hang_rank, "hang: the others waited for rank"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_fault_in_the_middle_changes_no_loss(chain: SubmittedChain, expected: list, fault: Fault, cause: str) -> None:
    chain.until_step("stage1.5", STEPS // 2)
    fault(chain, chain.jobs["stage1.5"], random.Random(1))
    arrives(chain, expected)
    ended = [event for event in chain.events("ended") if event["stage"] == "stage1.5"]
    assert len(ended) == 2 and ended[-1]["outcome"] == "complete"
    assert cause in ended[0]["cause"] and ended[0]["step"] >= 10, ended
    if fault in (signal_ranks, signal_batch):
        assert ended[0]["step"] >= STEPS // 2, "an orderly stop saves the step it was at"


@pytest.mark.parametrize("fault", [lose_node, drain_node], ids=lambda value: value.__name__)
def test_a_node_that_goes_away_changes_no_loss(chain: SubmittedChain, expected: list, fault: Fault) -> None:
    chain.until_step("stage1.5", STEPS // 2)
    fault(chain, chain.jobs["stage1.5"], random.Random(1))
    arrives(chain, expected)


def test_a_stage_that_fails_at_the_same_place_for_ever_is_given_up(
    slurm: ThrowawaySlurm, stand_in: tuple[Path, Path], tmp_path: Path
) -> None:
    chain = submit_with(slurm, stand_in, tmp_path, STAND_IN_DIES_AT="stage1 15 3")
    assert chain.wait() == {"stage1": "FAILED", "stage1.5": "CANCELLED", "stage2": "CANCELLED"}
    (given_up,) = chain.events("gave_up")
    assert "3 starts in a row without a new checkpoint (still at step 10)" in given_up["cause"]
    assert "rank 3 on node n2: Killed" in given_up["cause"] and given_up["cause"] in chain.logs()
    assert [event["step"] for event in chain.events("started")] == [0, 10, 10, 10]
    nothing_left(chain)


def test_a_killed_note_is_written_again(
    slurm: ThrowawaySlurm, stand_in: tuple[Path, Path], expected: list, tmp_path: Path
) -> None:
    """The batch script's own question, "what now?", is a process that can be killed, too."""
    chain = submit_with(slurm, stand_in, tmp_path, STAND_IN_KILLS_NOTE=str(tmp_path / "killed"))
    arrives(chain, expected)
    assert "megatron-eagle job begin was killed, time 1 of 3" in chain.logs()
    assert [event["stage"] for event in chain.events("started")] == list(STAGES)


def test_a_cancelled_job_stays_cancelled(chain: SubmittedChain) -> None:
    chain.until_step("stage1", 15)
    chain.slurm.run("scancel", chain.jobs["stage1"])
    assert chain.wait() == dict.fromkeys(STAGES, "CANCELLED")
    nothing_left(chain)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes, as a file system of their own."""
    with small_disk(tmp_path / "disk", megabytes=2) as folder:
        yield folder


def test_a_full_disk_stops_the_chain_and_is_named(
    slurm: ThrowawaySlurm, stand_in: tuple[Path, Path], disk: Path
) -> None:
    """Checkpoints of 0.6 MB: the fourth does not fit."""
    chain = submit_with(slurm, stand_in, disk, STAND_IN_CHECKPOINT_BYTES="600000")
    assert chain.wait() == {"stage1": "FAILED", "stage1.5": "CANCELLED", "stage2": "CANCELLED"}
    (given_up,) = chain.events("gave_up")
    assert "the disk is full" in given_up["cause"] and len(chain.events("started")) == 1
    assert chain.events("ended")[0]["step"] == 30, "the checkpoints before it are untouched"
    nothing_left(chain)


@pytest.mark.parametrize("seed", range(20))
def test_random_faults(chain: SubmittedChain, expected: list, seed: int) -> None:
    """One to four faults of any kind at any moment: arrive with the same losses, or stop within the budget."""
    random_ = random.Random(seed)
    for _ in range(random_.randint(1, 4)):
        time.sleep(random_.uniform(0.5, 6.0))
        running = [job for job in chain.jobs.values() if chain.slurm.state(job) == "RUNNING"]
        if running:
            random_.choice(FAULTS)(chain, running[0], random_)
    ends = chain.wait(300)
    if all(end == "COMPLETED" for end in ends.values()):
        assert losses(chain.runs) == expected
    else:
        assert [event["cause"] for event in chain.events("gave_up")], chain.logs()
        assert losses(chain.runs) == expected[: len(losses(chain.runs))]
    assert len(chain.events("started")) <= 3 * (1 + 5 + 3)
    nothing_left(chain)
