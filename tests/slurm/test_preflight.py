"""The pre-flight inside a job: the bad node is named, and the job goes on without it where there is a spare one.

Slurm, batch script, doctor and supervisor are real; the trainer that follows is the stand-in. All nodes are this host,
so the bad one is made: another package or clock by what its Python finds first, another disk by a mount of its own.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from chain import ROOT, SubmittedChain, losses, profile, small_recipe, stand_in_python, submit
from small_run import SmallRun
from stand_in import expected_losses
from throwaway import ThrowawaySlurm

BAD = "n2"


@pytest.fixture
def three_nodes() -> Iterator[ThrowawaySlurm]:
    """For jobs of two nodes: one is spare. Slurm takes the first two."""
    with ThrowawaySlurm.start(nodes=3) as cluster:
        yield cluster


def other_package(folder: Path) -> None:
    info = folder / "megatron_energon-7.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-energon\nVersion: 7.0.0\n")


def other_clock(folder: Path) -> None:
    (folder / "sitecustomize.py").write_text("import time\nright = time.time\ntime.time = lambda: right() - 60\n")


def never_starts(folder: Path) -> None:
    """Only the pre-flight: whatever else runs on the node has to end."""
    (folder / "sitecustomize.py").write_text("import sys, time\nif 'doctor' in sys.orig_argv: time.sleep(600)\n")


def python_with(prepare: object, folder: Path) -> str:
    """The stand-in's Python, which finds what ``prepare`` made first of all on the bad node."""
    only_there = folder / "only-there"
    only_there.mkdir()
    prepare(only_there)  # type: ignore[operator]
    usual = stand_in_python(folder)
    script = folder / "python-of-the-node"
    script.write_text(
        f'#!/bin/bash\nif [ "$SLURMD_NODENAME" = {BAD} ]; then export PYTHONPATH={only_there}:$PYTHONPATH; fi\n'
        f'exec {usual} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def send(slurm: ThrowawaySlurm, small_run: SmallRun, folder: Path, python: str, **changes: object) -> SubmittedChain:
    """The first stage only, with the pre-flight before it."""
    recipe = small_recipe(small_run, folder / "recipe.yaml", steps=10, checkpoint_every=5)
    cluster = profile(folder / "cluster.yaml", python=python, preflight=True, **changes)
    return submit(slurm, recipe, cluster, folder, "--stages", "stage1")


def goes_on_without(chain: SubmittedChain, cause: str) -> None:
    assert chain.wait(400) == {"stage1": "COMPLETED"}, chain.logs()
    first, second = chain.events("ended")
    assert first["bad_nodes"] == [BAD] and f"pre-flight: node {BAD}: " in first["cause"], first
    assert cause in first["cause"], first
    assert [event["nodes"] for event in chain.events("started")] == ["n[1-2]", "n[1,3]"]
    assert "leaving out node n2" in chain.logs() and "all-reduce of 1 MiB over 4 processes" in chain.logs()
    stages = yaml.safe_load((chain.folder / "jobs" / "recipe.yaml").read_text())["stages"]
    assert losses(chain.runs) == expected_losses(stages[:1])
    assert second["outcome"] == "complete" and chain.slurm.processes() == []


@pytest.mark.parametrize(
    ("prepare", "seconds", "cause"),
    [
        (other_package, 120, "megatron-energon is 7.0.0, elsewhere 7.4.1"),
        pytest.param(other_clock, 120, "its clock is off by -60 s", marks=pytest.mark.long),
        pytest.param(never_starts, 40, "ranks 2, 3 of 4 did not answer within 40 s", marks=pytest.mark.long),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
@pytest.mark.timeout(900)
def test_a_node_that_differs_is_left_out(
    three_nodes: ThrowawaySlurm, small_run: SmallRun, tmp_path: Path, prepare: object, seconds: float, cause: str
) -> None:
    python = python_with(prepare, tmp_path)
    goes_on_without(send(three_nodes, small_run, tmp_path, python, preflight_seconds=seconds), cause)


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "cause"),
    [("size=9m", "does not see what ranks 0, 1 wrote"), ("size=9m,ro", "Read-only file system")],
    ids=["not shared", "read-only"],
)
@pytest.mark.timeout(900)
def test_a_node_with_another_disk_is_left_out(
    three_nodes: ThrowawaySlurm, small_run: SmallRun, tmp_path: Path, options: str, cause: str
) -> None:
    """Its slurmd sees another file system where the run's folder is."""
    if os.getuid() or not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("another disk is made with unshare and mount, which this user may not do")
    (tmp_path / "small").mkdir()
    mount = f'mount -t tmpfs -o {options} tmpfs {tmp_path}/small && exec "$@"'
    three_nodes.kill_node(BAD)
    three_nodes.start_node(BAD, "unshare", "-m", "bash", "-c", mount, "slurmd")
    three_nodes.until(lambda: three_nodes.node_states() == ["idle"] * 3, "all nodes idle")
    goes_on_without(send(three_nodes, small_run, tmp_path, str(stand_in_python(tmp_path))), cause)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_without_a_spare_node_it_is_given_up_and_named(
    slurm: ThrowawaySlurm, small_run: SmallRun, tmp_path: Path
) -> None:
    chain = send(slurm, small_run, tmp_path, python_with(other_package, tmp_path))
    assert chain.wait(400) == {"stage1": "FAILED"}, chain.logs()
    assert "node n2 stays: without it only 1 of 2 nodes would be left" in chain.logs()
    (given_up,) = chain.events("gave_up")
    assert "node n2: megatron-energon is 7.0.0" in given_up["cause"] and len(chain.events("started")) == 3
    assert slurm.processes() == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_nodes_left_out_stay_left_out(small_run: SmallRun, tmp_path: Path) -> None:
    """The profile's own exclusions, and one bad node after the other: none comes back."""
    usual = stand_in_python(tmp_path)
    script = tmp_path / "python-that-dies"
    script.write_text(
        '#!/bin/bash\nif [ "$3" = train ] && [[ $SLURMD_NODENAME = n[34] ]]; then kill -KILL $$; fi\n'
        f'exec {usual} "$@"\n'
    )
    script.chmod(0o755)
    with ThrowawaySlurm.start(nodes=5) as cluster:
        recipe = small_recipe(small_run, tmp_path / "recipe.yaml", steps=10, checkpoint_every=5)
        settings = {"python": str(script), "exclude": ["n1"], "environment": {"PYTHONPATH": str(ROOT)}}
        chain = submit(cluster, recipe, profile(tmp_path / "c.yaml", **settings), tmp_path, "--stages", "stage1")
        assert chain.wait(200) == {"stage1": "COMPLETED"}, chain.logs()
        tried = [event["nodes"] for event in chain.events("started")]
        assert len(tried) == 3 and tried[0] == "n[2-3]" and tried[-1] == "n[2,5]", tried
