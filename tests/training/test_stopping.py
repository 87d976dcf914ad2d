"""Stopping by signal, and ending when hanging, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_eagle.training.watchdog import HANG_EXIT_CODE, HangLimits, Watchdog

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
