"""One submit, three stages, on a throw-away Slurm: two nodes, two processes each, the real templates."""

import random
from pathlib import Path

import pytest
from chain import STAGES, command, losses, submit
from test_faults import kill_rank, requeue, signal_batch
from throwaway import ThrowawaySlurm


def test_the_throwaway_slurm_runs_on_both_nodes(slurm: ThrowawaySlurm) -> None:
    assert sorted(slurm.run("srun", "-N2", "bash", "-c", "echo $SLURMD_NODENAME").split()) == ["n1", "n2"]


@pytest.mark.timeout(900)
def test_one_submit_arrives_with_the_losses_of_a_run_without_slurm(
    slurm: ThrowawaySlurm, recipe: Path, cluster: Path, expected: list, tmp_path: Path
) -> None:
    chain = submit(slurm, recipe, cluster, tmp_path)
    assert chain.wait(600) == dict.fromkeys(STAGES, "COMPLETED"), chain.logs()
    assert losses(tmp_path) == expected
    assert [(event["stage"], event["outcome"]) for event in chain.events("ended")] == [(s, "complete") for s in STAGES]
    shown = command("status", str(chain.folder), environment=slurm.environment).stdout.splitlines()
    assert [line.split()[0] for line in shown[1:]] == list(STAGES)
    assert all("complete" in line and "4/4" in line for line in shown[1:]), shown
    assert slurm.processes() == []


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_real_trainer_under_faults(
    slurm: ThrowawaySlurm, recipe: Path, cluster: Path, expected: list, tmp_path: Path
) -> None:
    """A requeue, a time limit's signal and a killed process, one in each stage."""
    chain = submit(slurm, recipe, cluster, tmp_path)
    for stage, fault in zip(STAGES, (requeue, signal_batch, kill_rank), strict=True):
        chain.until_step(stage, 1)
        fault(chain, chain.jobs[stage], random.Random(0))
    assert chain.wait(900) == dict.fromkeys(STAGES, "COMPLETED"), chain.logs()
    assert losses(tmp_path) == expected
    assert len(chain.events("started")) == 6, chain.logs()
