"""Answers on disk: one file of JSON lines, appended to as answers come, looked up by what was asked.

A line is there whole or not at all: one that a kill has torn is read as if it were not there, and its question is asked
again. A question that was asked as often as is allowed and not answered has a line, too, and may be asked again. One
process at a time has a folder. In memory: the place of every line, about 200 bytes an answer.
"""

import fcntl
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_eagle.endpoint.question import Reply
from megatron_eagle.errors import UserError

ANSWERS_FILE = "answers.jsonl"


class AnswerCache:
    """The answers in a folder, which is made; UserError if another process has it. Threads may share it.

    each: called with (model, reply) of every answer that is there.
    """

    def __init__(self, folder: Path, each: Callable[[str, Reply], None] = lambda model, reply: None) -> None:
        self.path = folder / ANSWERS_FILE
        self._guard = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # noqa: SIM115  open as long as this is
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise UserError(f"another process is asking with the answers in {folder}") from None
        except OSError as error:
            raise UserError(f"answers cannot be kept in {folder}: {error.strerror or error}") from None
        self._failed: set[bytes] = set()  # no answer yet
        self._places = self._read(each)

    def _read(self, each: Callable[[str, Reply], None]) -> dict[bytes, tuple[int, int]]:
        places: dict[bytes, tuple[int, int]] = {}
        at, whole = 0, True
        self._file.seek(0)
        for line in self._file:
            whole = line.endswith(b"\n")
            try:
                entry = json.loads(line)
                digest, model = bytes.fromhex(entry["digest"]), entry["model"]
                reply = None if "failed" in entry else _reply(entry)
            except (ValueError, KeyError, TypeError):  # torn, or empty
                pass
            else:
                if whole and reply is None:
                    self._failed.add(digest)
                elif whole and reply is not None and digest not in places:
                    places[digest] = (at, len(line))
                    each(model, reply)
            at += len(line)
        if not whole:
            self._file.write(b"\n")
            self._file.flush()
        return places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, digest: str) -> Reply | None:
        """The answer to what has this digest, None if there is none."""
        place = self._places.get(bytes.fromhex(digest))
        if place is None:
            return None
        return _reply(json.loads(os.pread(self._file.fileno(), place[1], place[0])))

    def put(self, digest: str, model: str, reply: Reply) -> None:
        """Keeps an answer; UserError if the disk is full."""
        entry: dict[str, Any] = {"digest": digest, "model": model, "text": reply.text, "finish": reply.finish}
        entry |= {"in": reply.tokens_in, "out": reply.tokens_out}
        with self._guard:
            self._places[bytes.fromhex(digest)] = self._append(entry)

    def put_failed(self, digest: str, model: str) -> None:
        """Keeps that a question was not answered; UserError if the disk is full."""
        with self._guard:
            self._append({"digest": digest, "model": model, "failed": True})

    def failed_before(self, digest: str) -> bool:
        """Whether this question was not answered before the folder was opened."""
        return bytes.fromhex(digest) in self._failed

    def _append(self, entry: dict[str, Any]) -> tuple[int, int]:
        """Place and length of the new line."""
        line = json.dumps(entry).encode() + b"\n"
        try:
            at = self._file.seek(0, os.SEEK_END)
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from None
        return at, len(line)

    def close(self) -> None:
        """Everything is on the disk, and the folder is free."""
        os.fsync(self._file.fileno())
        self._file.close()


def _reply(entry: dict[str, Any]) -> Reply:
    return Reply(entry["text"], entry["finish"], entry["in"], entry["out"])
