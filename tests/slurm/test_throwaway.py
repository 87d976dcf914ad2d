"""The throw-away Slurm itself: two of them on one host are two, and a requeued job waits for nobody."""

import os
import signal
from pathlib import Path

from throwaway import DAEMON_PORTS, ThrowawaySlurm

HOLDS_A_PORT = """\
#!/bin/bash
#SBATCH --requeue --open-mode=append
export RANK=0  # this and its words make it a rank
exec bash {folder}/stand_in.py train $FIRST_PORT $PORTS
"""
WAITS = "echo $1 $2 $3 >> {folder}/said\nwhile :; do sleep 1; done\n"


def hold(slurm: ThrowawaySlurm, folder: Path) -> str:
    """Submit a job whose only process looks like a rank; returns its number once it runs."""
    folder.mkdir(exist_ok=True)
    (folder / "stand_in.py").write_text(WAITS.format(folder=folder))
    (folder / "job").write_text(HOLDS_A_PORT.format(folder=folder))
    job = slurm.run("sbatch", "--parsable", f"--output={folder}/log", str(folder / "job")).strip()
    slurm.until(lambda: len(slurm.ranks(job)) == 1, "the rank is there")
    return job


def test_two_clusters_on_one_host_do_not_touch_each_other(tmp_path: Path) -> None:
    with ThrowawaySlurm.start(nodes=1) as one, ThrowawaySlurm.start(nodes=1) as other:
        assert not set(one.ports) & set(other.ports)
        job = hold(one, tmp_path / "one")
        assert hold(other, tmp_path / "other") == job
        assert len(one.ranks(job)) == len(other.ranks(job)) == 1 and one.ranks(job) != other.ranks(job)
        assert not set(one.processes()) & set(other.processes())
        said = [(tmp_path / name / "said").read_text() for name in ("one", "other")]
        assert said == [f"train {slurm.ports[DAEMON_PORTS]} {1000 - DAEMON_PORTS}\n" for slurm in (one, other)]
        other.kill_node("n1")
        assert len(one.ranks(job)) == 1 and not other.processes()


def test_a_job_whose_old_processes_live_on_starts_again_beside_them(tmp_path: Path) -> None:
    """Its slurmd is gone, so Slurm takes the node for lost and starts the job on the other one."""
    with ThrowawaySlurm.start(nodes=2) as slurm:
        job = hold(slurm, tmp_path / "run")
        (old,) = slurm.ranks(job).values()
        node = slurm.job(job)["NodeList"]
        slurm.kill_slurmd(node)
        slurm.until(lambda: slurm.ranks(job).get(0, old) != old, "a second start")
        assert old in slurm.processes() and slurm.job(job)["NodeList"] != node
        os.kill(old, signal.SIGKILL)
