"""One trainer at a time in a run's folder, and a lock that no killed trainer leaves behind; in real processes."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from train_cases import metrics, train
from worlds import WorldError

from megatron_eagle.errors import UserError
from megatron_eagle.training.run_lock import LOCK, hold

ROOT = Path(__file__).parents[2]
HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from megatron_eagle.training.run_lock import hold

with hold(Path(sys.argv[1]), print):
    reader = os.fork()  # as a reader of data, which may outlive its trainer
    if not reader:
        time.sleep(600)
        os._exit(0)
    other = subprocess.Popen(["sleep", "600"])
    print(reader, other.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds the lock of ``tmp_path``; its two children outlive it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    children = [int(word) for word in process.stdout.readline().split()]
    yield process
    process.kill()
    for child in children:
        os.kill(child, signal.SIGKILL)
    process.communicate()


def refusal(folder: Path, said: list[str], patience: float = 30.0) -> str:
    with pytest.raises(UserError) as caught, hold(folder, said.append, patience=patience):
        raise AssertionError("two trainers")
    return str(caught.value)


def test_the_second_is_refused_by_name_until_the_first_is_killed(holder, tmp_path: Path) -> None:
    said: list[str] = []
    started = time.monotonic()
    line = refusal(tmp_path, said)
    assert time.monotonic() - started < 1 and not said  # no waiting for a live node
    assert f"another trainer is at work in {tmp_path}: process {holder.pid} on {socket.gethostname()}, since 2" in line
    assert "\n" not in line
    holder.kill()
    holder.wait()
    with hold(tmp_path, said.append):  # although the children are still there
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not said


def test_every_process_of_the_second_run_is_refused(holder, small_run, worlds, tmp_path: Path) -> None:
    recipe = small_run.write_recipe(tmp_path / "r.yaml", name=tmp_path.name)
    with pytest.raises(WorldError) as caught:
        worlds(2).run(train, str(recipe), "first", str(tmp_path.parent))
    assert str(caught.value).count(f"UserError: another trainer is at work in {tmp_path}: process {holder.pid}") == 2


def test_the_file_that_a_kill_leaves_is_no_lock(tmp_path: Path) -> None:
    for content in ('{"host": "elsewhere", "pid": 1, "since": "2026"}', "", "\0\0", '["x"]'):
        (tmp_path / LOCK).write_text(content)
        with hold(tmp_path, pytest.fail):
            pass


def test_another_node_is_waited_for_because_it_may_be_dead(holder, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"host": "elsewhere", "pid": 7, "since": "2026-11-26"}')
    said: list[str] = []
    assert "process 7 on elsewhere, since 2026-11-26" in refusal(tmp_path, said, patience=0.3)
    assert len(said) == 1 and "waiting 0 s" in said[0]
    threading.Timer(0.5, holder.kill).start()
    with hold(tmp_path, said.append):
        pass
    assert len(said) == 2


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*arguments) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", fail)
    said: list[str] = []
    with hold(tmp_path, said.append):
        pass
    assert len(said) == 1 and "nothing keeps a second trainer out" in said[0]
    code = errno.EIO
    with pytest.raises(UserError, match="cannot lock .*Input/output error"), hold(tmp_path, said.append):
        pass


def test_a_trainer_is_killed_and_the_next_one_follows_another_recipe(small_run, tmp_path: Path) -> None:
    """Real commands: a second one beside the first is refused; after kill -9 the given number of steps counts."""
    stage = {**small_run.settings()["stages"][1], "checkpoint_every": 2, "decay": "linear", "warmup_fraction": 0.0}
    recipe = small_run.write_recipe(tmp_path / "r.yaml", stages=[{**stage, "steps": 100_000}])
    command = [sys.executable, "-m", "megatron_eagle", "train", str(recipe), "--stage", "second", "--runs", "runs"]
    settings = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **settings)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/small/checkpoints/second/latest")) and time.monotonic() < deadline:
            time.sleep(0.05)
        second = subprocess.run(command, capture_output=True, timeout=120, check=False, **settings)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2 and f"process {first.pid} on {socket.gethostname()}" in second.stderr
    assert len(second.stderr.splitlines()) == 1 and not second.stdout
    reached = int((tmp_path / "runs/small/checkpoints/second/latest").read_text().removeprefix("step_"))
    steps = reached + 3
    third = subprocess.run(
        [*command, f"stages.second.steps={steps}"], capture_output=True, timeout=120, check=False, **settings
    )
    assert third.returncode == 0, third.stderr
    assert re.search(rf"^second resumed with changes: stages.second.steps 100000 -> {steps}$", third.stdout, re.M)
    rates = {entry["step"]: entry["learning_rate"] for entry in metrics(tmp_path / "runs")}
    wanted = {step: 1e-3 * (1 - step / steps) for step in range(reached + 1, steps + 1)}
    assert {step: rates[step] for step in wanted} == pytest.approx(wanted, abs=1e-12)
