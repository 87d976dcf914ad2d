"""Ctrl-C and SIGTERM in the middle of the work, in real processes: what is kept, how to go on, the same result."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from project import ROOT
from samples import make_records, write_jsonl
from train_cases import losses

from megatron_eagle.cli import _parse
from megatron_eagle.cli.interrupts import interruptible
from megatron_eagle.data.build.worker_pool import WorkerPool
from megatron_eagle.training.watchdog import STOPPED_EXIT_CODE


def hear_ctrl_c() -> None:
    """As a terminal starts a command; what starts the tests may ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_eagle", *arguments], cwd=ROOT, text=True, start_new_session=True,
        preexec_fn=hear_ctrl_c, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """(exit code, stderr)"""
    said = process.communicate(timeout=250)[1]
    return process.returncode, said


def wait_until(reached: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 250
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def told_command(said: str) -> list[str]:
    command = shlex.split(re.search(r"continue with: megatron-eagle (.+)", said)[1])
    assert "Traceback" not in said, said
    return command


@pytest.mark.slow
def test_ctrl_c_saves_the_step_of_every_process_and_the_command_it_tells_continues(small_run, tmp_path) -> None:
    """As a terminal does: to the whole group. The losses are those of a run that nobody disturbed."""
    stage = {**small_run.settings()["stages"][0], "steps": 30, "checkpoint_every": 1000}
    recipe = small_run.write_recipe(tmp_path / "r.yaml", layout={"pp": 2}, stages=[stage])
    whole, runs = tmp_path / "whole", tmp_path / "the runs"
    command = ["train", str(recipe), "--stage", "first", "--processes", "2", "--runs"]
    undisturbed = start(*command, str(whole))
    process = start(*command, str(runs))
    metrics = runs / "small" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    os.killpg(process.pid, signal.SIGINT)
    code, said = end(process)
    steps = len(losses(runs))
    assert code == STOPPED_EXIT_CODE and 3 <= steps < 30
    assert said.splitlines() == [
        "megatron-eagle: ending the step and saving it; Ctrl-C again aborts",
        f"megatron-eagle: first was asked to stop: saved step {steps} in {runs}/small/checkpoints/first; "
        f"continue with: megatron-eagle {shlex.join([*command, str(runs)])}",
    ]
    assert end(start(*told_command(said)))[0] == 0 and end(undisturbed)[0] == 0
    assert losses(runs) == losses(whole) and len(losses(runs)) == 30


WATCHING = """
import signal, time
from megatron_eagle.training.watchdog import Watchdog
watch = Watchdog(way_on="continue with: that")
watch.leave_on(signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
watch.training_begins()
print("training", flush=True)
time.sleep(60)
"""


def test_a_second_ctrl_c_aborts() -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", WATCHING], preexec_fn=hear_ctrl_c, **pipes)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)  # it may come before, and more than once: that is no Ctrl-C
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, said = end(process)
    assert (code, said) == (130, "megatron-eagle: aborted, the newest checkpoint is kept; continue with: that\n")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, "2"), (signal.SIGTERM, "1")])
def test_an_interrupted_build_continues_to_the_same_bytes(tmp_path, number, workers) -> None:
    from megatron_eagle.data.build.dataset import build_dataset

    (tmp_path / "source").mkdir()
    source = write_jsonl(tmp_path / "source", make_records(tmp_path / "source", 400))
    out = tmp_path / "out"
    process = start("data", "build", str(source), str(out), "--samples-per-shard", "4", "--workers", workers)
    state = tmp_path / ".out.partial" / ".state"
    wait_until(lambda: len(list(state.glob("shard-*.json"))) >= 2, process)
    os.killpg(process.pid, number)
    code, said = end(process)
    assert code == 128 + number and not out.exists()
    *progress, last = said.splitlines()
    assert last.startswith(f"megatron-eagle: interrupted ({number.name}): finished shards are kept in {state.parent};")
    assert all(line == "" or line.startswith("building from") for line in progress), said
    from megatron_eagle.cli import main

    with pytest.raises(SystemExit) as ended:
        main(told_command(said))
    assert ended.value.code == 0
    build_dataset(source, tmp_path / "whole", samples_per_shard=4)
    for shard in sorted((tmp_path / "whole").glob("*.tar")):
        assert shard.read_bytes() == (out / shard.name).read_bytes()


LONG = {
    "data build a b": "finished shards are kept in ./.b.partial",
    "data join b": "the parts are kept",
    "data check b": "nothing is kept of the check",
    "data measure tiny": "shards that were counted stay counted",
    "evaluate tiny --data d": "the answers given so far are kept",
    "evaluate tiny --data d --losses": "losses are not kept",
    "convert hf-to-megatron a b": "whole files are kept in b.partial",
    "convert megatron-to-hf a b": "whole files are kept in b.partial",
    "convert megatron-to-peft a b": "nothing is kept",
    "convert peft-to-megatron a b c": "nothing is kept",
    "convert check a b": "nothing is kept of the check",
    "curate p b": "finished blocks are kept in ./.b.partial",
    "curate admit a b --pool p --images m --texts t": "finished blocks are kept in ./.b.partial",
    "curate synthesise b --pages 3": "pictures without records are in b, remove it first",
    "demo": "what is finished is kept in runs",
    "train tiny --stage stage1": "what was saved before is kept",
}


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", LONG)
def test_every_long_verb_says_what_it_keeps(handlers, monkeypatch, capsys, command: str, number) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-eagle", *command.split()])
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("multiprocessing.active_children", list)  # those of this process serve the other tests
    with pytest.raises(SystemExit) as ended, interruptible(_parse(command.split())):
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert ended.value.code == 128 + number
    said = f"megatron-eagle: interrupted ({number.name}): {LONG[command]}; continue with: megatron-eagle {command}\n"
    assert capsys.readouterr().err == said


def test_handlers_are_given_back_and_what_is_ignored_stays_so(handlers) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible(Namespace(kept=lambda options: "")):
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) != signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler


@pytest.mark.slow
def test_helpers_of_a_verb_are_ended_with_it(tmp_path: Path) -> None:
    """A pool would wait for its work, and a terminal's Ctrl-C makes it print tracebacks."""
    (tmp_path / "work.py").write_text(
        "import sys, time\nfrom argparse import Namespace\n"
        "from megatron_eagle.cli.interrupts import interruptible\n"
        "from megatron_eagle.data.build.worker_pool import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    with interruptible(Namespace(kept=lambda options: 'all')), WorkerPool(2) as pool:\n"
        "        asked = [pool.submit(time.sleep, 60) for _ in range(4)]\n"
        "        print('asked', flush=True)\n        asked[0].result()\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for pause in (0.02, 1.5):  # while the workers start, and while they work
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "work.py")], env=environment, preexec_fn=hear_ctrl_c, **pipes
        )
        process.stdout.readline()
        time.sleep(pause)
        started = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        code, said = end(process)
        assert code == 130 and time.monotonic() - started < 20
        assert said.startswith("megatron-eagle: interrupted (SIGINT): all; ") and said.count("\n") == 1, said


def test_workers_do_not_hear_what_a_terminal_sends_to_all() -> None:
    with WorkerPool(1) as pool:
        assert signal.SIGINT in pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


DURING_IMPORT = """
import os, sys
from megatron_eagle.__main__ import run
class Interrupting:
    def find_spec(self, name, *more):
        os.kill(os.getpid(), 2) if name == "megatron_eagle.cli" else None
sys.meta_path.insert(0, Interrupting())
run()
"""
UNWINDING = """
import os, time
from argparse import Namespace
from megatron_eagle.cli.interrupts import interruptible
with interruptible(Namespace(kept=lambda options: "all")):
    try:
        os.kill(os.getpid(), 2)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), 15)
        os.kill(os.getpid(), 2)
        time.sleep(60)
"""


@pytest.mark.parametrize(
    ("code", "ended", "said"),
    [(DURING_IMPORT, -2, ""), (UNWINDING, 130, "megatron-eagle: aborted: all; continue with: megatron-eagle\n")],
)
def test_an_end_is_without_traceback_from_first_to_last(code: str, ended: int, said: str) -> None:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=hear_ctrl_c, check=False)
    assert (done.returncode, done.stderr) == (ended, said)
