"""How a training process is stopped from outside, and how it notices that it hangs.

A time limit or a preemption reaches the processes of a run as a signal, each at its own moment. They agree on it with
the numbers of each step (``step_stats.py``), so that all of them leave after the same step, with a checkpoint of it. A
hang is the opposite: no process can agree on anything any more, so each one watches its own clock, writes down where
all its threads stand and ends itself.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from megatron_eagle.parallel.launch import STOPPING

STOPPED_EXIT_CODE = 85  # "saved, and to be continued"; any number nothing else uses
HANG_EXIT_CODE = 86
SUPERSEDED_EXIT_CODE = 88  # a newer start of the run is at work
NON_FINITE_EXIT_CODE = 87  # a loss or gradient that is no number: the same start would end the same way
STACKS_FOLLOW = "Timeout ("  # how faulthandler begins
SILENT = "ranks that wrote no stacks: "
STEPS_REMEMBERED = 64
STEPS_BEFORE_MEDIAN = 3
_POLL_SECONDS = 0.5
SUSPENDED_SECONDS = 5.0  # a watch that was not woken for so long did not run: suspended, as by ``scontrol suspend``
SUSPENDED = "stood still for"
ASKED = "was asked to stop before its first step"


class StoppedEarly(Exception):
    """The run was asked to stop, has saved, and is not at its last step."""


@dataclass(frozen=True)
class HangLimits:
    """When a step counts as hanging, in seconds.

    factor: a step may take this many times the median of the recent ones,
    at_least: but never less than this.
    otherwise: limit for all that is not an ordinary step: start, first steps, saving a checkpoint, a batch of answers.
    grace: between writing the stacks and ending the process, so that the others write theirs before they are ended.
    """

    factor: float = 20.0
    at_least: float = 300.0
    otherwise: float = 1800.0
    grace: float = 10.0

    def __post_init__(self) -> None:
        if min(self.factor, self.at_least, self.otherwise) <= 0 or self.grace < 0:
            raise ValueError(f"hang limits must be positive, got {self}")


class Watchdog:
    """One process's watch over its own training; ``close`` it at the end.

    limits: when to call it a hang; None watches nothing.
    stacks: folder that gets ``rank_00003.txt`` with the stacks of all threads of a process that hangs.
    way_on: said to a person who stops the run: how to continue it.
    """

    def __init__(
        self, limits: HangLimits | None = None, stacks: Path | None = None, rank: int = 0, way_on: str = ""
    ) -> None:
        self._limits = limits
        self._way_on = f"; {way_on}" if way_on else ""
        self._stop = False
        self._leaving: tuple[signal.Signals, ...] = ()
        self._rank, self._process = rank, os.getpid()
        self._recent: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._mark = time.monotonic()
        self._limit = self._deadline = float("inf")
        self._file: TextIO | None = None
        self._closed = threading.Event()
        if limits is not None:
            if stacks is None:
                raise ValueError("hang limits need a folder for the stacks")
            self._file = _open_stacks(stacks, rank)
            self._heading = self._file.tell()
            self._allow(limits.otherwise)
            threading.Thread(target=self._end_when_hanging, name="hang-watch", daemon=True).start()

    def stop_on(self, *signals: signal.Signals) -> None:
        """From now on these signals ask for a stop after the current step, instead of ending the process."""
        for number in signals:
            signal.signal(number, self._ask)

    def leave_on(self, *signals: signal.Signals) -> None:
        """From now on these signals end this process with STOPPED_EXIT_CODE, until ``training_begins``.

        Before the first step there is nothing to save, and the processes cannot agree on anything yet. A signal that is
        ignored (by nohup, or because it is the parent's to answer) stays so.
        """
        self._leaving = tuple(number for number in signals if signal.getsignal(number) != signal.SIG_IGN)
        for number in self._leaving:
            signal.signal(number, self._leave)

    def training_begins(self) -> None:
        """From now on a signal of ``leave_on`` asks for a stop after the current step."""
        self.stop_on(*self._leaving)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a reader forked before training began: its trainer decides
            return
        # No print: the signal may have come amid one.
        if self._rank == 0 or not self._way_on:  # a person is told once, a scheduler's log has the ranks
            _write(f"rank {self._rank} {ASKED} ({signal.Signals(number).name}){self._way_on}")
        os._exit(STOPPED_EXIT_CODE)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if number == signal.SIGINT:
            if self._stop:
                _write(f"aborted, the newest checkpoint is kept{self._way_on}")
                os._exit(128 + number)
            _write(STOPPING)
        self._stop = True

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._stop

    def step_done(self) -> None:
        """Note that a step is done: the next one has its own time."""
        now = time.monotonic()
        self._recent.append(now - self._mark)
        self._mark = now
        self._allow(self._step_limit())

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around anything between steps that takes its own time."""
        if self._limits is not None:
            self._allow(self._limits.otherwise)
        yield
        self._mark = time.monotonic()
        self._allow(self._step_limit())

    def goes_on(self) -> None:
        """Note, within ``saving``, that something got done: what is left of it has its own time."""
        if self._limits is not None:
            self._allow(self._limits.otherwise)

    def close(self) -> None:
        """Stop watching; the stack file stays if the process was late enough to write its stacks."""
        self._closed.set()
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if time.monotonic() < self._deadline:
                Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def _step_limit(self) -> float:
        if self._limits is None:
            return float("inf")
        if len(self._recent) < STEPS_BEFORE_MEDIAN:
            return self._limits.otherwise
        return max(self._limits.at_least, self._limits.factor * statistics.median(self._recent))

    def _allow(self, seconds: float) -> None:
        if self._file is None:
            return
        self._limit = seconds
        self._deadline = time.monotonic() + seconds
        # A thread in C: it writes the stacks even while some call holds Python's lock for ever.
        faulthandler.dump_traceback_later(seconds, file=self._file)

    def _end_when_hanging(self) -> None:
        assert self._limits is not None
        looked = time.monotonic()
        while not self._closed.wait(_POLL_SECONDS):
            lost, looked = time.monotonic() - looked, time.monotonic()
            if lost > SUSPENDED_SECONDS:
                self._start_anew(lost)
            if time.monotonic() > self._deadline + self._limits.grace:
                self._name_the_silent()
                os._exit(HANG_EXIT_CODE)

    def _start_anew(self, lost: float) -> None:
        """The clock ran on while this process did not: that is no hang, and the stacks just written mean nothing."""
        self._mark += lost
        self._allow(self._limit)  # waits for the thread that may be writing them
        if self._file is not None:
            self._file.truncate(self._heading)
            self._file.seek(self._heading)
        print(f"megatron-eagle: rank {self._rank} {SUSPENDED} {lost:.0f} s", file=sys.stderr, flush=True)

    def _name_the_silent(self) -> None:
        """Whoever has written no stacks by now cannot; when this process ends, its scheduler may wake it up."""
        if self._file is None:
            return
        files = sorted(Path(self._file.name).parent.glob("rank_*.txt"))
        silent = [file.stem.removeprefix("rank_") for file in files if STACKS_FOLLOW not in file.read_text()]
        self._file.write(f"{SILENT}{' '.join(silent)}\n")
        self._file.flush()


def node_name() -> str:
    """What Slurm calls this machine, or what it calls itself."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def _write(line: str) -> None:
    """From a signal's handler."""
    os.write(2, f"megatron-eagle: {line}\n".encode())


def _open_stacks(folder: Path, rank: int) -> TextIO:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"rank_{rank:05d}.txt").open("w", encoding="utf-8")
    file.write(f"rank {rank} on {node_name()}, process {os.getpid()}\n")
    file.flush()
    return file
