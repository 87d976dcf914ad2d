"""What happens to a start while it runs: the controller away, two starts at once, signals while starting, a suspension.

The trainer is the stand-in; ``test_real_starts.py`` has the same with the real one. Each chain arrives with the losses
of an undisturbed run, and blames no healthy node.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import yaml
from chain import STAGES, SubmittedChain, losses, profile, small_recipe, stand_in_python, submit
from small_run import SmallRun
from stand_in import expected_losses
from throwaway import ThrowawaySlurm

from megatron_eagle.cluster.status import UNKNOWN, read_status

STEPS = 30
# A busy machine must not look like a hang here; the one suspension is longer than a step may take.
HANG = {"factor": 20, "at_least": 8, "otherwise": 60, "grace": 1}


@pytest.fixture(scope="module")
def pair() -> Iterator[ThrowawaySlurm]:
    """A Slurm of its own, because its controller and its nodes are lost; jobs have one node, and one is spare."""
    with ThrowawaySlurm.start(nodes=2) as cluster:
        yield cluster


def send(
    slurm: ThrowawaySlurm,
    small_run: SmallRun,
    folder: Path,
    *,
    stages: str = "stage1",
    steps: int = STEPS,
    **changes: object,
) -> tuple[SubmittedChain, list]:
    """Submit ``stages`` on one node each; the chain, and what it has to log."""
    slurm.until(lambda: slurm.node_states() == ["idle", "idle"], "both nodes are well")
    recipe = small_recipe(small_run, folder / "recipe.yaml", steps=steps, checkpoint_every=10)
    variables = changes.pop("environment", {})
    nodes = dict.fromkeys(STAGES, 1)
    cluster = profile(folder / "cluster.yaml", python=str(stand_in_python(folder)), hang=HANG, nodes=nodes, **changes)
    settings = yaml.safe_load(cluster.read_text())
    settings["environment"] |= variables
    chain = submit(slurm, recipe, profile(cluster, **settings), folder, "--stages", stages)
    expected = expected_losses(yaml.safe_load(recipe.read_text())["stages"])
    return chain, [entry for entry in expected if entry[0] in stages.split(",")]


def inode(chain: SubmittedChain) -> int:
    """Of the metrics; each start writes the file anew."""
    return (chain.folder / "metrics.jsonl").stat().st_ino


def ends(chain: SubmittedChain) -> list[tuple[str, list[str]]]:
    return [(event["outcome"], event["bad_nodes"]) for event in chain.events("ended")]


def with_word(slurm: ThrowawaySlurm, word: str) -> list[int]:
    """Ranks of the cluster's jobs that have ``word`` among their arguments: neither their shells nor the sruns, which
    are there before them and after."""
    found = []
    for process in slurm.processes():
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if word.encode() in words and not words[0].endswith((b"bash", b"srun")):
            found.append(process)
    return found


@pytest.mark.long  # a minute of waiting for Slurm
def test_the_controller_is_away_when_a_stage_ends(pair: ThrowawaySlurm, small_run: SmallRun, tmp_path: Path) -> None:
    """Until long after its last step; the stage is complete all the same, and ``status`` says what it can meanwhile."""
    chain, expected = send(pair, small_run, tmp_path)
    chain.until_step("stage1", STEPS // 2)
    pair.stop_controller()
    try:
        shutil.copy(chain.folder / "events.jsonl", tmp_path)  # the stand-in's metrics are not all that ``status`` wants
        with mock.patch.dict(os.environ, pair.environment):
            rows = read_status(tmp_path, patience=0.0)
        deadline = time.monotonic() + 60
        while chain.step("stage1") < STEPS and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(6)  # for the script to ask in vain
    finally:
        pair.start_controller()
    assert [(row.state, row.why) for row in rows] == [(UNKNOWN, "Slurm cannot be asked")]
    assert chain.wait(180) == {"stage1": "COMPLETED"}, chain.logs()
    assert losses(chain.runs) == expected and ends(chain) == [("complete", [])]


def test_two_starts_alive_at_once(pair: ThrowawaySlurm, small_run: SmallRun, tmp_path: Path) -> None:
    """A slurmd is killed alone: the stage starts again on the other node while its old ranks train on."""
    chain, expected = send(pair, small_run, tmp_path, steps=80)
    chain.until_step("stage1", 12)
    job = chain.jobs["stage1"]
    old, node = pair.ranks(job), pair.job(job)["NodeList"]
    for process in old.values():
        os.kill(process, signal.SIGSTOP)  # or the stage would be at its end before the second start can train
    pair.kill_slurmd(node)
    logged = inode(chain)
    pair.until(lambda: inode(chain) != logged, "the second start trains", poll=0.02)
    for process in old.values():
        os.kill(process, signal.SIGCONT)
    assert chain.wait(180) == {"stage1": "COMPLETED"}, chain.logs()
    assert losses(chain.runs) == expected, "each step once, with the losses of one run"
    assert ends(chain) == [("interrupted", []), ("complete", [])]
    pair.until(lambda: not pair.processes(), "the old ranks have left by themselves")
    assert "job is PENDING: nothing to decide" in chain.logs(), "the old script leaves, too"
    pair.start_node(node)
    pair.until(lambda: pair.node_states() == ["idle", "idle"], "the node is back")


@pytest.mark.parametrize("number", ["TERM", pytest.param("USR1", marks=pytest.mark.long)])
def test_a_signal_while_ranks_import_is_a_stop(
    pair: ThrowawaySlurm, small_run: SmallRun, tmp_path: Path, number: str
) -> None:
    chain, expected = send(pair, small_run, tmp_path, environment={"STAND_IN_IMPORTS": "4"})
    job = chain.jobs["stage1"]
    pair.until(lambda: len(pair.ranks(job)) == 2, "the ranks are there", poll=0.05)
    pair.run("scancel", f"--signal={number}", job)
    assert chain.wait(180) == {"stage1": "COMPLETED"}, chain.logs()
    assert losses(chain.runs) == expected
    assert ends(chain) == [("stopped", []), ("complete", [])], chain.logs()
    assert pair.job(job)["ExcNodeList"] == "(null)"


def test_a_signal_in_the_pre_flight_is_a_stop(pair: ThrowawaySlurm, small_run: SmallRun, tmp_path: Path) -> None:
    chain, expected = send(pair, small_run, tmp_path, preflight=True)
    pair.until(lambda: len(with_word(pair, "doctor")) == 2, "the pre-flight", poll=0.05)
    pair.run("scancel", "--signal=TERM", chain.jobs["stage1"])
    assert chain.wait(180) == {"stage1": "COMPLETED"}, chain.logs()
    assert losses(chain.runs) == expected
    assert ends(chain) == [("stopped", []), ("complete", [])], chain.logs()


@pytest.mark.long  # test_stopping.py has the same without Slurm
def test_a_suspension_longer_than_a_hang_blames_nobody(
    pair: ThrowawaySlurm, small_run: SmallRun, tmp_path: Path
) -> None:
    chain, expected = send(pair, small_run, tmp_path)
    chain.until_step("stage1", 12)
    pair.run("scontrol", "suspend", chain.jobs["stage1"])
    time.sleep(HANG["at_least"] + HANG["grace"] + 3)
    pair.run("scontrol", "resume", chain.jobs["stage1"])
    assert chain.wait(180) == {"stage1": "COMPLETED"}, chain.logs()
    assert losses(chain.runs) == expected
    assert ends(chain) == [("complete", [])], chain.logs()
    assert "rank 0 stood still for " in chain.logs()
