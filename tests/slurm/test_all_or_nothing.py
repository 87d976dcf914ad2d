"""Submitting is all or nothing, whatever happens between two jobs; what is in the queue is found and cancelled."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import yaml
from chain import ROOT, STAGES, command, losses, profile, small_recipe, stand_in_python, submit
from stand_in import expected_losses
from throwaway import ThrowawaySlurm

from megatron_eagle.cli import main
from megatron_eagle.cluster.events import read_events
from megatron_eagle.cluster.queueing import LOCK
from megatron_eagle.cluster.status import read_status


@pytest.fixture
def trained(small_run, tmp_path: Path) -> tuple[Path, Path]:
    """Recipe and cluster profile, with the stand-in."""
    recipe = small_recipe(small_run, tmp_path / "recipe.yaml", steps=(60, 4, 4))
    environment = {"PYTHONPATH": str(ROOT)}
    return recipe, profile(tmp_path / "cluster.yaml", python=str(stand_in_python(tmp_path)), environment=environment)


def wrapped(slurm: ThrowawaySlurm, folder: Path, name: str, script: str) -> dict[str, str]:
    """The environment in which ``name`` is ``script`` around the real command, $real; $n is the number of the call."""
    folder.mkdir()
    (folder / name).write_text(
        f'#!/bin/bash\n[ "$1" != --test-only ] || exec /usr/bin/{name} "$@"\n'
        f"real=/usr/bin/{name} n=$(($(cat {folder}/n 2>/dev/null || echo 0) + 1)); echo $n > {folder}/n\n{script}\n"
    )
    (folder / name).chmod(0o755)
    return slurm.environment | {"PATH": f"{folder}:{slurm.environment['PATH']}"}


def refused(arguments: list[str], environment: dict[str, str]) -> int | str | None:
    with mock.patch.dict(os.environ, environment), pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


@contextmanager
def nothing_starts(slurm: ThrowawaySlurm, runs: Path) -> Iterator[None]:
    try:
        yield
        assert slurm.run("squeue", "--noheader") == ""
    finally:
        slurm.run("scancel", "--me")
    assert not list(runs.glob("*/jobs/*.log")) and not (runs / "small" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "script", "code", "words"),
    [
        ("sbatch", '"$real" "$@"; [ $n != 2 ] || kill -INT $PPID', 130, "interrupted: what was queued"),
        ("sbatch", '"$real" "$@"; [ $n != 1 ] || kill -TERM $PPID', 130, "interrupted: what was queued"),
        ("sbatch", '[ $n != 3 ] || { echo too many >&2; exit 1; }; "$real" "$@"', 2, "too many"),
        ("sbatch", '"$real" "$@" || exit; [ $n != 2 ] || { echo timed out >&2; exit 1; }', 2, "timed out"),
        ("scontrol", '[ "$1" != release ] || { echo not now >&2; exit 1; }; exec "$real" "$@"', 2, "not now"),
    ],
    ids=["ctrl-c", "term", "refused", "queued-but-not-said", "not-released"],
)
def test_what_was_queued_is_taken_back(
    slurm: ThrowawaySlurm,
    trained: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    script: str,
    code: int,
    words: str,
) -> None:
    recipe, cluster = map(str, trained)
    environment = wrapped(slurm, tmp_path / "bin", name, script)
    with nothing_starts(slurm, tmp_path):
        assert refused(["submit", recipe, "--cluster", cluster, "--runs", str(tmp_path)], environment) == code
        said = capsys.readouterr().err.strip()
        assert words in said and "\n" not in said


def test_a_submission_that_cannot_be_noted_is_taken_back(
    slurm: ThrowawaySlurm, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, cluster = map(str, trained)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "events.jsonl").symlink_to("/dev/full")
    with nothing_starts(slurm, tmp_path):
        assert refused(["submit", recipe, "--cluster", cluster, "--runs", str(tmp_path)], slurm.environment) == 2
    assert "No space left on device; nothing was submitted" in capsys.readouterr().err


HOLDS = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


def test_beside_a_submission_that_is_at_work_nothing_is_written(
    slurm: ThrowawaySlurm, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both would find the queue empty."""
    recipe, cluster = map(str, trained)
    jobs = tmp_path / "small" / "jobs"
    jobs.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(jobs / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with nothing_starts(slurm, tmp_path), holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert refused(["submit", recipe, "--cluster", cluster, "--runs", str(tmp_path)], slurm.environment) == 2
        assert f"another submission of {jobs.parent} is at work" in capsys.readouterr().err
        assert [file.name for file in jobs.iterdir()] == [LOCK]
        holder.kill()
        slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # a job could start before it is cancelled
        try:
            assert refused(["submit", recipe, "--cluster", cluster, "--runs", str(tmp_path)], slurm.environment) == 0
            assert refused(["cancel", str(jobs.parent)], slurm.environment) == 0
        finally:
            slurm.run("scontrol", "update", "PartitionName=main", "State=UP")


def test_jobs_are_found_whatever_the_shell_sets_for_its_own_look(
    slurm: ThrowawaySlurm, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, cluster = map(str, trained)
    arguments = ["submit", recipe, "--cluster", cluster, "--runs", str(tmp_path)]
    slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        assert refused(arguments, slurm.environment) == 0
        assert refused(arguments, slurm.environment | {"SQUEUE_STATES": "COMPLETED", "SQUEUE_PARTITION": "ours"}) == 2
        assert "already has jobs in the queue" in capsys.readouterr().err
        assert refused(["cancel", str(tmp_path / "small")], slurm.environment) == 0
    finally:
        slurm.run("scontrol", "update", "PartitionName=main", "State=UP")


@pytest.mark.long
def test_of_two_submissions_at_once_one_is_queued(
    slurm: ThrowawaySlurm, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, cluster = map(str, trained)
    line = [sys.executable, "-m", "megatron_eagle", "submit", recipe, "--cluster", cluster, "--runs", str(tmp_path)]
    slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    environment = slurm.environment | {"PYTHONPATH": str(ROOT)}
    try:
        many = [subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
        said = [each.communicate()[1] for each in many]
        assert sorted(each.returncode for each in many) == [0, 2, 2], said
        assert len(slurm.run("squeue", "--noheader").splitlines()) == len(STAGES)
        assert all("is at work" in words or "already has jobs in the queue" in words for words in said if words)
        assert refused(["cancel", str(tmp_path / "small")], slurm.environment) == 0
    finally:
        slurm.run("scontrol", "update", "PartitionName=main", "State=UP")


@pytest.mark.slow
def test_a_killed_submission_never_starts_and_is_found(
    slurm: ThrowawaySlurm, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 after two of three: what is queued waits, is named by the next submission, and can be cancelled."""
    recipe, cluster = map(str, trained)
    environment = wrapped(slurm, tmp_path / "bin", "sbatch", '"$real" "$@"; [ $n != 2 ] || kill -KILL $PPID')
    arguments = ["submit", recipe, "--cluster", cluster, "--runs", str(tmp_path)]
    assert command(*arguments, environment=environment).returncode == -signal.SIGKILL
    with nothing_starts(slurm, tmp_path):
        time.sleep(2)
        assert slurm.run("squeue", "--noheader", "--format=%j %T %r", "--sort=i").splitlines() == [
            "small-stage1 PENDING JobHeldUser",
            "small-stage1.5 PENDING Dependency",
        ]
        assert refused(arguments, slurm.environment) == 2
        said = capsys.readouterr().err
        assert "(stage1.5, pending); end them first: scancel" in said
        assert refused(["cancel", str(tmp_path / "small")], slurm.environment) == 0
        assert capsys.readouterr().out.count("cancelled: job ") == 2
        slurm.until(lambda: slurm.run("squeue", "--noheader") == "", "an empty queue")
    assert refused(["cancel", str(tmp_path / "small")], slurm.environment) == 2
    assert "no job of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cancelled_middle_stage_is_submitted_alone(
    slurm: ThrowawaySlurm, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the stage before it trains on: it follows that one's job."""
    recipe, cluster = trained
    chain = submit(slurm, recipe, cluster, tmp_path, "--stages", "stage1,stage1.5")
    chain.until_step("stage1", 1)
    slurm.run("scancel", chain.jobs["stage1.5"])
    again = ["submit", str(recipe), "--cluster", str(cluster), "--runs", str(tmp_path), "--stages"]
    assert refused([*again, "stage1.5", "seed=5"], slurm.environment) == 2
    assert "trains another recipe than this one" in capsys.readouterr().err
    assert refused([*again, "stage1,stage1.5"], slurm.environment) == 2
    assert f"(stage1, running); end them first: scancel {chain.jobs['stage1']}" in capsys.readouterr().err
    later = submit(slurm, recipe, cluster, tmp_path, "--stages", "stage1.5")
    assert slurm.job(later.jobs["stage1.5"])["Dependency"].startswith(f"afterok:{chain.jobs['stage1']}")
    assert later.wait() == {"stage1.5": "COMPLETED"}, later.logs()
    assert losses(tmp_path) == expected_losses(yaml.safe_load(recipe.read_text())["stages"][:2])


def test_cancelled_jobs_are_shown_as_cancelled(
    slurm: ThrowawaySlurm, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """Scripts given to sbatch by hand from their own folder are found, too."""
    slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        chain = submit(slurm, *trained, tmp_path)
        events = chain.folder / "events.jsonl"
        noted = events.read_text()
        events.write_text('{"time": "2026-11-')
        again = ["submit", str(trained[0]), "--cluster", str(trained[1]), "--runs", str(tmp_path)]
        assert refused(again, slurm.environment) == 2
        events.write_text(noted)
        subprocess.run(["sbatch", "stage2.sbatch"], cwd=chain.folder / "jobs", env=slurm.environment, check=True)
        assert refused(["cancel", str(chain.folder)], slurm.environment) == 0
        slurm.until(lambda: slurm.run("squeue", "--noheader") == "", "an empty queue")
    finally:
        slurm.run("scontrol", "update", "PartitionName=main", "State=UP")
    with mock.patch.dict(os.environ, slurm.environment):
        rows = read_status(chain.folder)
    assert [(row.stage, row.state) for row in rows] == [(stage, "cancelled") for stage in STAGES]
    assert len(read_events(chain.folder)[-1]["jobs"]) == 4


def test_a_refusal_names_the_nodes_that_are_missing(
    slurm: ThrowawaySlurm, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["submit", str(trained[0]), "--runs", str(tmp_path / "runs"), "--cluster"]
    slurm.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=a fan")
    try:
        assert refused([*arguments, str(trained[1])], slurm.environment) == 2
    finally:
        slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    words = "stage 'stage1' needs 2 nodes; of the 2 of partition 'main' 1 can be used: n2 is drained: a fan"
    assert words in capsys.readouterr().err
    settings = yaml.safe_load(trained[1].read_text()) | {"exclude": ["n[1-2]"]}
    assert refused([*arguments, str(profile(tmp_path / "c.yaml", **settings))], slurm.environment) == 2
    assert "0 can be used: n1 is in exclude of cluster profile 'throwaway'; n2 is in" in capsys.readouterr().err
