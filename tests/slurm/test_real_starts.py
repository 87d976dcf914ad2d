"""``test_starts.py`` with the real trainer: losses and sample digests are those of a run without any fault."""

import os
import signal
import time
from pathlib import Path

import pytest
from chain import ROOT, STAGES, STEPS, Losses, SubmittedChain, losses, profile, submit
from throwaway import ThrowawaySlurm

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


def on_one_node(path: Path) -> Path:
    """All four processes of a stage on one node; the other one is spare."""
    return profile(path, tasks_per_node=4, nodes=dict.fromkeys(STAGES, 1), hang={"at_least": 60, "otherwise": 600})


def stop_while_importing(slurm: ThrowawaySlurm, chain: SubmittedChain) -> None:
    job = chain.jobs["stage1"]
    slurm.until(lambda: len(slurm.ranks(job)) == 4, "the ranks are there", 300, 0.05)
    slurm.run("scancel", "--signal=TERM", job)


def start_again_beside_the_old_one(slurm: ThrowawaySlurm, chain: SubmittedChain) -> str:
    """The node whose slurmd is gone."""
    job = chain.jobs["stage1.5"]
    chain.until_step("stage1.5", 3)
    node, old = slurm.job(job)["NodeList"], slurm.ranks(job)
    for process in old.values():
        os.kill(process, signal.SIGSTOP)
    slurm.kill_slurmd(node)
    logged = chain.folder / "metrics.jsonl"
    before = logged.stat().st_ino
    slurm.until(lambda: logged.stat().st_ino != before, "the second start trains: it writes the file anew", 300)
    for process in old.values():
        os.kill(process, signal.SIGCONT)
    return node


def end_without_a_controller(slurm: ThrowawaySlurm, chain: SubmittedChain) -> None:
    chain.until_step("stage2", 2)
    slurm.stop_controller()
    deadline = time.monotonic() + 300
    while chain.step("stage2") < STEPS and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(25)
    slurm.start_controller()


def test_a_stop_two_starts_and_a_controller_that_is_away_change_no_loss(
    recipe: Path, expected: Losses, tmp_path: Path
) -> None:
    with ThrowawaySlurm.start(nodes=2) as slurm:
        chain = submit(slurm, recipe, on_one_node(tmp_path / "cluster.yaml"), tmp_path)
        stop_while_importing(slurm, chain)
        node = start_again_beside_the_old_one(slurm, chain)
        end_without_a_controller(slurm, chain)
        assert chain.wait(900) == dict.fromkeys(STAGES, "COMPLETED"), chain.logs()
        assert losses(tmp_path) == expected
        ends = [(event["stage"], event["outcome"], event["bad_nodes"]) for event in chain.events("ended")]
        assert ends == [
            ("stage1", "stopped", []),
            ("stage1", "complete", []),
            ("stage1.5", "interrupted", []),
            ("stage1.5", "complete", []),
            ("stage2", "complete", []),
        ], chain.logs()
        assert slurm.node_states() != ["idle", "idle"], f"{node} is still lost: the second start was on the other one"


def test_a_damaged_checkpoint_of_the_stage_before_has_a_way_on(
    slurm: ThrowawaySlurm, recipe: Path, expected: Losses, tmp_path: Path
) -> None:
    """It is refused by name with what it would cost; submitted again as the message says, the losses are the same."""
    cluster = profile(tmp_path / "cluster.yaml", environment={"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"})
    assert submit(slurm, recipe, cluster, tmp_path, "--stages", "stage1").wait(600) == {"stage1": "COMPLETED"}
    folder = tmp_path / "small" / "checkpoints" / "stage1"
    assert (folder / f"step_{STEPS - 2:08d}").exists(), "an older one"
    shard = max((folder / f"step_{STEPS:08d}").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    refused = submit(slurm, recipe, cluster, tmp_path, "--stages", "stage1.5")
    assert refused.wait(600) == {"stage1.5": "FAILED"}
    (given_up,) = refused.events("gave_up")
    assert f"{shard.name} has other bytes than were written" in given_up["cause"]
    assert "with '--fallback' and '--stage stage1' (of submit: '--stages stage1,stage1.5')" in given_up["cause"]
    assert f"step_{STEPS - 2:08d}, and 2 of its {STEPS} steps are trained again" in given_up["cause"]
    again = submit(slurm, recipe, cluster, tmp_path, "--stages", "stage1,stage1.5", "--fallback")
    assert again.wait(900) == {"stage1": "COMPLETED", "stage1.5": "COMPLETED"}, again.logs()
    assert losses(tmp_path) == [entry for entry in expected if entry[0] != "stage2"]
