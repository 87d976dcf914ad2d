"""Only the newest start of a run writes: every start takes a number, its token, and leaves when it sees a higher one.

Two starts can be alive at once without anybody's mistake: a node that its scheduler takes for lost may train on while
the job starts again elsewhere. A lock cannot help there, because nobody can tell whether its holder is dead, and one
on a dead node stays. So the new start is always let in, and the old one is kept from writing: it looks for a higher
number before it publishes a checkpoint, logs a line or notes its end.

``RUN/starts/<number>`` is created exclusively and says who that start is. This needs of a file system that of several
creators with O_EXCL one wins (NFS since version 3, Lustre, GPFS, BeeGFS, local disks), and that opening a folder shows
what was created in it before, on whatever node: close-to-open consistency, which NFS has unless it is mounted with
``nocto``; there a number is seen up to ``acdirmax`` later, 60 s by default. No locks, no clocks, nothing to clean up.

Between looking and writing lies a moment in which a process may stand still. A checkpoint that it then publishes is
whole and of the same numbers, unless the new start has deleted its folder, as it does when it saves; of the log it may
add one line, for a step that the new start logs, too.
"""

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_eagle.errors import Superseded, UserError

STARTS = "starts"


@dataclass(frozen=True)
class Start:
    """One start of a run, on the process that writes for it."""

    run_folder: Path
    number: int

    def require_newest(self) -> None:
        """Raise Superseded, which names the newer start, unless this is the newest; OSError if that cannot be known.

        Costs one listing of a small folder.
        """
        newest = max(_numbers(self.run_folder), default=0)
        if newest > self.number:
            who = _words(_read(self.run_folder, newest))
            raise Superseded(f"start {self.number} of {self.run_folder} is superseded by start {newest}: {who}")

    def sign(self) -> None:
        """Say in the start's file that this process is the one that writes now."""
        self.describe(_process())

    def describe(self, more: dict[str, Any]) -> None:
        """Add plain data to the start's file; UserError if it cannot be written."""
        try:
            self._say(more)
        except OSError as error:
            raise UserError(f"cannot write {self.run_folder / STARTS}: {error.strerror}") from None

    def leave(self) -> None:
        """Say in the start's file that nobody writes for it any more, for ``claim_by_hand``."""
        with suppress(OSError):
            self._say({"ticks": None})

    def _say(self, more: dict[str, Any]) -> None:
        file = self.run_folder / STARTS / str(self.number)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(_read(self.run_folder, self.number) | more), encoding="utf-8")
        new.replace(file)


class OwnStart:
    """The start that a process writes for, which is rank 0's alone, from joining the run to leaving it.

    number: of it, if whoever started the processes has taken one. superseded_by: what ``is_newest`` has found.
    """

    def __init__(self, run_folder: Path, number: int | None) -> None:
        self.number, self.superseded_by = number, ""
        self._run_folder = run_folder
        self._start: Start | None = None

    def join(self, needed: Callable[[], bool]) -> int | None:
        """Become a start of the run, by hand if that is ``needed``; its number, None if there is nothing to do.

        Raises Superseded if the number that was taken is not the newest, UserError if a trainer is known to be at work.
        """
        if self.number is not None:
            self._start = Start(self._run_folder, self.number)
            self.require_newest()
            self._start.sign()
        elif needed():
            self._start = claim_by_hand(self._run_folder)
        return self._start.number if self._start else None

    def require_newest(self) -> None:
        """Raise Superseded if a newer start of the run is at work."""
        if self._start is not None:
            self._start.require_newest()

    def is_newest(self, say: Callable[[str], None]) -> bool:
        """Asked just before a step is logged; the other processes learn of a newer start with the next step's numbers.

        A network disk's hiccup ends no healthy run: a folder that cannot be listed shows no newer start. Before a
        checkpoint is published it is looked at again, and there the failure counts.
        """
        try:
            self.require_newest()
        except Superseded as superseded:
            self.superseded_by = str(superseded)
        except OSError as error:
            say(f"cannot look for a newer start: {error}; training goes on")
        return not self.superseded_by

    def describe(self, more: dict[str, Any]) -> None:
        """As of ``Start``."""
        if self._start is not None:
            self._start.describe(more)

    def leave(self) -> None:
        """As of ``Start``."""
        if self._start is not None:
            self._start.leave()


def claim(run_folder: Path, **who: str) -> Start:
    """Become the newest start of the run; UserError if its folder cannot be written. who: e.g. job="17"."""
    folder = run_folder / STARTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = max(_numbers(run_folder), default=0)
        while True:
            number += 1
            try:
                handle = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                break
            except FileExistsError:  # another start was quicker: it is older then
                continue
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(who | _process()))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    return Start(run_folder, number)


def claim_by_hand(run_folder: Path) -> Start:
    """``claim``, but UserError if the newest start's process is alive on this very host: a person's slip.

    On other hosts nobody can know; there the older one leaves at its next step.
    """
    newest = _read(run_folder, max(_numbers(run_folder), default=0))
    if newest.get("host") == socket.gethostname() and newest.get("ticks") == _ticks(newest.get("pid", 0)) is not None:
        raise UserError(f"another trainer is at work in {run_folder}: {_words(newest)}; end it first")
    return claim(run_folder)


def read_starts(run_folder: Path) -> list[dict[str, Any]]:
    """Who every start of the run was, from the first on; those without a readable file are left out."""
    return [who for number in sorted(_numbers(run_folder)) if (who := _read(run_folder, number))]


def _process() -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "ticks": _ticks(os.getpid()), "since": since}


def _ticks(process: int) -> int | None:
    """When the process was started, in ticks since this host was; None if there is none. Process ids come again."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except OSError:
        return None


def _numbers(run_folder: Path) -> list[int]:
    try:
        return [int(name) for name in os.listdir(run_folder / STARTS) if name.isdigit()]
    except FileNotFoundError:
        return []


def _read(run_folder: Path, number: int) -> dict[str, Any]:
    """Who start ``number`` is; nothing if it has not written that yet."""
    try:
        who = json.loads((run_folder / STARTS / str(number)).read_text(encoding="utf-8"))
        return who if isinstance(who, dict) else {}
    except (OSError, ValueError):
        return {}


def _words(who: dict[str, Any]) -> str:
    if "pid" not in who:
        return "one that has not said its name yet"
    job = f"job {who['job']}, " if "job" in who else ""
    return f"{job}process {who['pid']} on {who.get('host')}, since {who.get('since')}"
