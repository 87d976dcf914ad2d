"""Only the newest start of a run writes, and a slip of hand is refused; in real processes."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from train_cases import losses, metrics, train
from worlds import WorldError

from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.errors import Superseded, UserError
from megatron_eagle.training.fencing import STARTS, Start, claim, claim_by_hand, read_starts

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from megatron_eagle.training.fencing import claim_by_hand

claim_by_hand(Path(sys.argv[1]))
print(flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that is the newest start of ``tmp_path``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_of_two_starts_the_older_one_must_not_write(tmp_path: Path) -> None:
    first = claim(tmp_path, job="12")
    first.require_newest()
    second = claim(tmp_path, job="13", nodes="n2")
    second.require_newest()
    here = f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(Superseded, match=f"start 1 of {tmp_path} is superseded by start 2: job 13, {here}, since 2"):
        first.require_newest()
    first.leave()
    second.require_newest()


def test_no_two_starts_get_the_same_number(tmp_path: Path) -> None:
    barrier, numbers = threading.Barrier(8), []

    def many() -> None:
        barrier.wait()
        numbers.extend(claim(tmp_path).number for _ in range(50))

    threads = [threading.Thread(target=many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 401))


def test_a_second_by_hand_is_refused_by_name_until_the_first_is_killed(holder, tmp_path: Path) -> None:
    words = f"another trainer is at work in {tmp_path}: process {holder.pid} on {socket.gethostname()}, since 2"
    with pytest.raises(UserError, match=words) as caught:
        claim_by_hand(tmp_path)
    assert "\n" not in str(caught.value)
    holder.kill()
    holder.wait()
    assert claim_by_hand(tmp_path).number == 2


def test_every_process_of_the_second_run_is_refused(holder, small_run, worlds, tmp_path: Path) -> None:
    recipe = small_run.write_recipe(tmp_path / "r.yaml", name=tmp_path.name)
    with pytest.raises(WorldError) as caught:
        worlds(2).run(train, str(recipe), "first", str(tmp_path.parent))
    assert str(caught.value).count(f"UserError: another trainer is at work in {tmp_path}: process {holder.pid}") == 2


@pytest.mark.parametrize(
    "content", ['{"host": "elsewhere", "pid": 1, "since": "2026", "ticks": 5}', "", "\0\0", '["x"]', '{"pid": "x"}']
)
def test_what_a_dead_start_leaves_holds_nobody_up(tmp_path: Path, content: str) -> None:
    """Another host's process may be dead or alive: it leaves if it sees the newer number."""
    (tmp_path / STARTS).mkdir()
    (tmp_path / STARTS / "7").write_text(content)
    assert claim_by_hand(tmp_path).number == 8
    with pytest.raises(Superseded, match="start 7 .* by start 8: process"):
        Start(tmp_path, 7).require_newest()


def test_a_process_id_that_came_again_is_another_process(tmp_path: Path) -> None:
    start = claim(tmp_path)
    file = tmp_path / STARTS / "1"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ticks": 1}))
    assert claim_by_hand(tmp_path).number == start.number + 1


def test_a_start_leaves_when_a_newer_one_is_there_and_the_losses_are_those_of_one(small_run, worlds, tmp_path) -> None:
    """The first is in the middle of a stage that saves every step, as on a node that its scheduler took for lost."""
    stage = {**small_run.settings()["stages"][0], "steps": 40, "checkpoint_every": 3}
    recipe = small_run.write_recipe(tmp_path / "r.yaml", stages=[stage])
    command = [sys.executable, "-m", "megatron_eagle", "train", str(recipe), "--stage", "first", "--runs"]
    settings = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
    alone = subprocess.Popen([*command, "alone"], stdout=subprocess.DEVNULL, **settings)
    old = subprocess.Popen([*command, "runs"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **settings)
    run = tmp_path / "runs" / "small"
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "first" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    new = claim(run, job="13")
    said = old.communicate(timeout=60)[1]
    assert old.returncode == 88 and said.count("\n") == 1, said
    assert f"start 1 of runs/small is superseded by start {new.number}: job 13, process" in said
    logged = len(losses(tmp_path / "runs"))
    again = [*command, "runs", "--start", str(new.number)]
    done = subprocess.run(again, capture_output=True, timeout=120, check=False, **settings)
    assert done.returncode == 0, done.stderr
    assert alone.wait(120) == 0 and 3 <= logged < 40
    assert losses(tmp_path / "runs") == losses(tmp_path / "alone") and len(losses(tmp_path / "alone")) == 40
    explains_itself(run, recipe)


def explains_itself(run: Path, recipe: Path) -> None:
    """What the newest start says of itself, and the recipe beside it, which can be given again."""
    newest = read_starts(run)[-1]
    assert f"--start {len(read_starts(run))}" in newest["command"] and "torch" in newest["packages"]
    assert newest["stage"] == "first" and newest["recipe"]["stages.first.steps"] == 40 and newest["ticks"] is None
    assert load_recipe(run / "recipe.yaml") == load_recipe(recipe)


def train_on_a_bad_disk(recipe_path: str, runs: str, failing: range) -> str | None:
    """Runs in a world of one; the error of training while those listings of the starts, from the first step, fail."""
    from megatron_eagle.training import fencing
    from megatron_eagle.training.loop import StageRun

    listings, listdir, one_step = [0], os.listdir, StageRun._one_step

    def listed(folder):
        if Path(folder).name == STARTS and listings[0]:
            listings[0] += 1
            if listings[0] - 1 in failing:
                raise OSError(errno.ESTALE, "Stale file handle")
        return listdir(folder)

    def step(*arguments):
        listings[0] = listings[0] or 1
        return one_step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fencing.os, "listdir", listed)
        patch.setattr(StageRun, "_one_step", step)
        try:
            train(recipe_path, "first", runs)
        except UserError as error:
            return str(error)
    return None


def test_a_disk_that_fails_for_a_while_ends_no_run_but_nothing_is_published_unseen(small_run, worlds, tmp_path) -> None:
    """One listing a step, then one as the checkpoint is begun and one before it is published."""
    stage = {**small_run.settings()["stages"][0], "steps": 4, "checkpoint_every": 4}
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml", stages=[stage]))
    for name, failing in (("log", range(1, 5)), ("begin", range(5, 6)), ("publish", range(6, 7))):
        (error,) = worlds(1).run(train_on_a_bad_disk, recipe, str(tmp_path / name), failing)
        assert len(losses(tmp_path / name)) == 4, "every step is logged"
        assert (tmp_path / name / "small/checkpoints/first/latest").exists() == (name == "log")
        assert error is None if name == "log" else "step_00000004" in error and "Stale file handle" in error


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
    assert len(second.stderr.splitlines()) == 1 and not second.stdout, second.stderr
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
