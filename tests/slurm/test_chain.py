"""One submit, three stages, on a throw-away Slurm: two nodes, two processes each, the real templates."""

import json
import random
from pathlib import Path

import pytest
from chain import STAGES, STEPS, command, losses, profile, submit
from test_faults import kill_rank
from throwaway import ThrowawaySlurm


def test_the_throwaway_slurm_runs_on_both_nodes(slurm: ThrowawaySlurm) -> None:
    assert sorted(slurm.run("srun", "-N2", "bash", "-c", "echo $SLURMD_NODENAME").split()) == ["n1", "n2"]


@pytest.mark.timeout(1500)
def test_one_submit_arrives_at_a_trained_and_exported_model(
    slurm: ThrowawaySlurm, recipe: Path, expected: list, tmp_path: Path
) -> None:
    """Also though a process of the second stage is killed: all losses are those of the run without Slurm."""
    exported = tmp_path / "exported"
    # Where Slurm has GPUs to hand out, the jobs ask for them as on a cluster; the trainer finds none and uses the CPU.
    gpus = {"gpus_per_node": slurm.gpus, "tasks_per_node": None} if slurm.gpus else {}
    cluster = profile(tmp_path / "cluster.yaml", **gpus)
    chain = submit(slurm, recipe, cluster, tmp_path, "--export", str(exported))
    chain.until_step("stage1.5", 3)
    kill_rank(chain, chain.jobs["stage1.5"], random.Random(0))
    assert chain.wait(900) == dict.fromkeys([*STAGES, "export"], "COMPLETED"), chain.logs()
    assert losses(tmp_path) == expected
    ends = [(event["stage"], event["outcome"], event["step"]) for event in chain.events("ended")]
    assert [end[:2] for end in ends] == [
        ("stage1", "complete"),
        ("stage1.5", "failed"),
        ("stage1.5", "complete"),
        ("stage2", "complete"),
        ("export", "complete"),
    ]
    assert ends[1][2] >= 2 and chain.events("started")[2]["step"] == ends[1][2], "it goes on from its checkpoint"
    proof = json.loads((exported / "proof.json").read_text())
    assert proof["passed"] and proof["source"].startswith(str(chain.folder / "checkpoints" / "stage2")), proof
    shown = command("status", str(chain.folder), environment=slurm.environment).stdout.splitlines()
    (header, *rows), (why, *more) = shown[:5], shown[5:]
    assert header.startswith("stage") and [line.split()[0] for line in rows] == [*STAGES, "export"], shown
    assert all("complete" in line for line in rows) and all(f"{STEPS}/{STEPS}" in line for line in rows[:3])
    assert why.startswith("stage1.5: ") and "Killed" in " ".join([why, *more]), shown
    assert all(line.startswith("  ") for line in more), "nothing is said of the others"
    assert slurm.processes() == []
