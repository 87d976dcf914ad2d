"""Files of a JSON object a line, only appended to (``events.jsonl``, ``metrics.jsonl``), and what disks do to them.

A disk that fills, a quota, a killed writer or a lost node can leave a piece of a line anywhere. So a line is written
whole or its writer hears of it, each begins on a line of its own, and readers skip the pieces and count them. Standard
library only, because it is read beside every start of a job.
"""

import errno
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Lines:
    """entries: (line number from 1, object) of each whole line; torn: numbers of the lines that are none."""

    entries: tuple[tuple[int, dict[str, Any]], ...] = ()
    torn: tuple[int, ...] = ()

    def said(self, path: Path) -> str:
        """One line about the torn ones; empty without any."""
        if not self.torn:
            return ""
        numbers = ", ".join(map(str, self.torn[:5])) + ", ..." * (len(self.torn) > 5)
        return f"{path}: {len(self.torn)} torn line(s) left out (line {numbers})"


def warn(line: str) -> None:
    """Say it on stderr; what readers do with their note on torn lines unless they are told otherwise."""
    print(f"megatron-eagle: {line}", file=sys.stderr, flush=True)


def append_text(path: Path, text: str, *, durable: bool) -> None:
    """Add whole lines; OSError (ENOSPC, EDQUOT, ...) unless every byte was taken. The file is made, its folder is not.

    text: ends with a newline. durable: return only when the disk has it; a network file system reports a quota then.
    One write each, so that processes of one node never mix their lines; between nodes the network file system would
    have to lock, and two writers in the same moment are what the run's tokens keep apart. ESTALE is tried once more: a
    file server that was restarted, or a folder that another node put in this one's place, is found again by its name.
    """
    try:
        _append_once(path, text, durable)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        _append_once(path, text, durable)


def _append_once(path: Path, text: str, durable: bool) -> None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        begun = size > 0 and os.pread(handle, 1, size - 1) != b"\n"  # somebody's piece of a line
        left = memoryview((b"\n" if begun else b"") + text.encode())
        while left:  # a disk takes what fits without an error, and says why at the next write
            left = left[os.write(handle, left) :]
        if durable:
            os.fsync(handle)
    finally:
        os.close(handle)


def read_lines(path: Path) -> Lines:
    """What is in the file, nothing if it does not exist."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Lines()
    entries, torn = [], []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:  # of text that is not UTF-8, too
            entry = None
        if isinstance(entry, dict):
            entries.append((number, entry))
        else:
            torn.append(number)
    return Lines(tuple(entries), tuple(torn))
