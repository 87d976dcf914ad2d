"""Runs the parts of a day, each in a process of its own, and keeps what each found in a file.

A part that crashes, hangs or is killed takes no other with it: its file says what became of it. A part whose file says
that it came to its end is not run again, so the command continues where it was interrupted.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from megatron_eagle.errors import UserError
from megatron_eagle.gpu_day.machine import this_machine
from megatron_eagle.gpu_day.part import Part, PartResult, Setting, known_parts, part_names, part_of
from megatron_eagle.parallel.launch import die_with_parent

MINUTES = 9.0  # that a part may take
LAST_WORDS = 2000  # characters of a part's output that its file keeps if it fails
NOT_KEPT = ("runs/", "traces/", "*.log")  # of a folder that is committed: large, and a trace opens only in a viewer
Ending = Literal["done", "failed", "out of time"]


@dataclass(frozen=True)
class Outcome:
    """How a part ended. result: None unless it is done. error: the end of what it printed if it is not."""

    part: str
    ending: Ending
    seconds: float
    date: str
    machine: dict[str, Any]
    result: PartResult | None = None
    error: str = ""

    def write(self, folder: Path) -> None:
        """Whole or not at all."""
        file = outcome_file(folder, self.part)
        file.parent.mkdir(parents=True, exist_ok=True)
        raw = asdict(self) | {"result": self.result.as_dict() if self.result else None}
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(raw, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(file)


def outcome_file(folder: Path, part: str) -> Path:
    """Where ``Outcome.write`` puts what became of a part."""
    return folder / "parts" / f"{part}.json"


def read_outcome(folder: Path, part: str) -> Outcome | None:
    """What ``Outcome.write`` left, None if there is nothing; UserError if it is something else."""
    file = outcome_file(folder, part)
    if not file.exists():
        return None
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        result = PartResult.of(raw["result"]) if raw["result"] else None
        return Outcome(**(raw | {"result": result}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no result of gpu-day ({error!r}); remove it to run the part again") from None


def choose_folder(out: Path, device: str, parts: Sequence[str]) -> Path:
    """The newest ``<date>-<device>`` of ``out`` that lacks one of ``parts``, else today's."""
    earlier = sorted(out.glob(f"[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-{device}"))
    if earlier and any(_missing(earlier[-1], part) for part in parts):
        return earlier[-1]
    return out / f"{datetime.now(UTC):%Y-%m-%d}-{device}"


def run_day(
    out: Path,
    chosen: Sequence[str] = (),
    *,
    toy: bool = False,
    minutes: float = MINUTES,
    say: Callable[[str], None] = print,
    find: Callable[[str], Part] = part_of,
    after_each: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Run the parts that are missing, or anew those ``chosen``; returns the day's folder.

    minutes: after which a part is ended. find: gives the function of a part; another one is for tests. after_each:
    called with the folder when a part has ended. UserError for a part that does not exist, and without a GPU unless
    ``toy``.
    """
    parts = known_parts(chosen) if find is part_of else tuple(chosen)
    machine = this_machine()
    if not machine.gpus and not toy:
        raise UserError("there is no GPU here; --toy runs every part at toy size on the CPU")
    folder = choose_folder(out, machine.slug + ("-toy" if toy else ""), part_names())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("".join(f"{name}\n" for name in NOT_KEPT), encoding="utf-8")
    for part in parts:
        if not chosen and not _missing(folder, part):
            say(f"{part}: done before")
            continue
        say(f"{part}: started, at most {minutes:g} min")
        outcome = _run_apart(part, find, Setting(folder, toy), minutes * 60, asdict(machine))
        outcome.write(folder)
        say(f"{part}: {outcome.ending} in {outcome.seconds:.0f} s{_remark(outcome)}")
        after_each(folder)
    return folder


def _missing(folder: Path, part: str) -> bool:
    outcome = read_outcome(folder, part)
    return outcome is None or outcome.ending != "done"


def _remark(outcome: Outcome) -> str:
    if outcome.result is None:
        lines = outcome.error.strip().splitlines()
        return f": {lines[-1]}" if lines else ""
    counted = {"skipped": len(outcome.result.skipped), "WRONG": len(outcome.result.wrong)}
    return "".join(f", {count} {word}" for word, count in counted.items() if count)


def _run_apart(
    part: str, find: Callable[[str], Part], setting: Setting, seconds: float, machine: dict[str, Any]
) -> Outcome:
    """The part in a process of its own, with all that it starts ended when it ends."""
    log = setting.folder / "parts" / f"{part}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_inside, args=(theirs, part, find, setting, log, sys.path))
    started = time.monotonic()
    process.start()
    theirs.close()
    found: tuple[PartResult | None, str] | None = None
    try:
        in_time = ours.poll(seconds)
        found = ours.recv() if in_time else None
    except EOFError:  # it died
        process.join(10)
        found = None, f"died with exit code {process.exitcode}\n{_last_words(log)}"
    finally:
        _end(process)
    result, error = found or (None, f"no result after {seconds:.0f} s\n{_last_words(log)}")
    ending: Ending = "done" if result else "failed" if found else "out of time"
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    return Outcome(part, ending, time.monotonic() - started, date, machine, result, error)


def _inside(pipe: Any, part: str, find: Callable[[str], Part], setting: Setting, log: Path, path: list[str]) -> None:
    """The life of a part's process: what it and its libraries print goes to ``log``, what it found to ``pipe``."""
    die_with_parent()
    os.setsid()  # so that all that it starts can be ended with it
    sys.path[:] = path
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        pipe.send((find(part)(setting), ""))
    except BaseException:
        traceback.print_exc()
        pipe.send((None, traceback.format_exc()[-LAST_WORDS:]))


def _end(process: Any) -> None:
    """Also the processes it started, which may live on without it."""
    if process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()  # it has not come as far as having a group of its own, or is gone
    process.join()


def _last_words(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")[-LAST_WORDS:]
    except OSError:
        return ""
