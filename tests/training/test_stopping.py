"""Stopping by signal, and ending when hanging, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_eagle.training.watchdog import HANG_EXIT_CODE, STOPPED_EXIT_CODE, HangLimits, Watchdog

ALONE = """
import signal, sys, time
from pathlib import Path
from megatron_eagle.training.watchdog import HangLimits, Watchdog

watch = Watchdog(HangLimits(factor=3, at_least=0.5, otherwise=20, grace=0.5), Path(sys.argv[1]), rank=3)
watch.stop_on(signal.SIGUSR1, signal.SIGTERM)
for step in range(int(sys.argv[2])):
    time.sleep(0.02)
    with watch.saving():
        time.sleep(0.8 if step == 4 else 0.0)  # longer than a step may take
    watch.step_done()
    if watch.asked:
        print("stopped", flush=True)
        break
    print("step", step, flush=True)
else:
    def stuck_here(): time.sleep(60)
    stuck_here()
watch.close()
"""


def start(folder: Path, steps: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", ALONE, str(folder), str(steps)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()})


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_stops_after_the_current_step(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, 10_000)
    assert process.stdout is not None and process.stdout.readline() == "step 0\n"
    process.send_signal(number)
    assert process.stdout.read().endswith("stopped\n")
    assert process.wait(20) == 0
    assert list(tmp_path.iterdir()) == [], "no stacks of a process that did not hang"


def test_a_hang_writes_its_stacks_and_ends(tmp_path: Path) -> None:
    process = start(tmp_path, 6)
    assert process.wait(30) == HANG_EXIT_CODE
    text = (tmp_path / "rank_00003.txt").read_text()
    assert text.startswith("rank 3 on ") and "Timeout (" in text and "in stuck_here" in text
    assert text.endswith("ranks that wrote no stacks: \n")


EARLY = """
import os, signal, sys, time
from pathlib import Path
from megatron_eagle.training.watchdog import Watchdog

watch = Watchdog(rank=3)
watch.leave_on(signal.SIGUSR1, signal.SIGTERM)
reader = os.fork()
if not reader:
    time.sleep(60)
print(reader, flush=True)
if sys.argv[1] == "training":
    watch.training_begins()
    print("training", flush=True)
while not watch.asked:
    time.sleep(0.01)
os.kill(reader, 0)
os.kill(reader, signal.SIGKILL)
"""


def start_early(moment: str) -> tuple["subprocess.Popen[str]", int]:
    """A process with a reader forked from it, and the reader."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", EARLY, moment], text=True, env=environment, **pipes)
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_before_the_first_step_a_signal_is_an_end_at_once(number: signal.Signals) -> None:
    process, reader = start_early("loading")
    os.kill(reader, number)  # its trainer decides, not the signal
    process.send_signal(number)
    assert process.wait(20) == STOPPED_EXIT_CODE
    os.kill(reader, signal.SIGKILL)
    assert process.stderr.read() == f"megatron-eagle: rank 3 was asked to stop before its first step ({number.name})\n"


def test_once_training_has_begun_it_is_a_wish() -> None:
    process, _ = start_early("training")
    assert process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == 0


def test_a_suspension_is_no_hang(tmp_path: Path) -> None:
    """Everything stands still for longer than a step may take, then all goes on; a hang after that is still one."""
    process = start(tmp_path, 120)
    assert [process.stdout.readline() for _ in range(10)][
        -1
    ] == "step 9\n"  # a step may take half a second from here on
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == HANG_EXIT_CODE
    text = (tmp_path / "rank_00003.txt").read_text()
    assert "step 119" in process.stdout.read() and text.count("Timeout (") == 1 and "in stuck_here" in text
    assert text.startswith("rank 3 on ")


EVALUATING = """
import sys, time
from pathlib import Path
from megatron_eagle.training.watchdog import HangLimits, Watchdog

watch = Watchdog(HangLimits(otherwise=1.5, grace=0.1), Path(sys.argv[1]))
with watch.saving():
    for batch in range(8):
        time.sleep(0.4)
        watch.goes_on()
print("answered", flush=True)
with watch.saving():
    time.sleep(60)
"""


def test_what_goes_on_is_no_hang_however_long_it_takes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", EVALUATING, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert (ended.stdout, ended.returncode) == ("answered\n", HANG_EXIT_CODE)


def test_a_plain_watch_costs_nothing(tmp_path: Path) -> None:
    watch = Watchdog()
    with watch.saving():
        time.sleep(0)
    watch.close()


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        HangLimits(factor=0)
    with pytest.raises(ValueError, match="folder for the stacks"):
        Watchdog(HangLimits())
