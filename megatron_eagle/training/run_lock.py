"""One trainer at a time in a run folder: rank 0's process holds a lock on ``RUN/lock`` as long as it trains.

Two trainers would write the same checkpoints and the same ``metrics.jsonl``. The lock is a POSIX record lock (fcntl),
and not flock's: it belongs to the process, so the kernel drops it however that process ends, ``kill -9`` included, and
processes that were forked from it (readers of data, which may outlive it by seconds) never hold it. The price: the
process must not open the file a second time, because closing that drops the lock; nothing but this module opens it.

It relies on the file system's locks: local disks, NFSv4 and Lustre (mounted with ``flock``; with ``localflock`` a lock
is only seen on its own node). Where there are none, that is said and training goes on. A node that dies takes up to
an NFSv4 lease, 90 s by default, to lose its locks, so a lock held on another node is waited for that long.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch.distributed as dist

from megatron_eagle.errors import UserError

LOCK = "lock"
LEASE_SECONDS = 100.0
_RETRY_SECONDS = 2.0
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def hold_as_one(
    run_folder: Path, rank: int, say: Callable[[str], None], *, patience: float = LEASE_SECONDS
) -> Iterator[None]:
    """``hold`` on rank 0 for all processes of a run, which call this together; its refusal is everybody's."""
    with ExitStack() as stack:
        message: list[str | None] = [None]
        if rank == 0:
            try:
                stack.enter_context(hold(run_folder, say, patience=patience))
            except UserError as error:
                message = [str(error)]
        dist.broadcast_object_list(message, src=0)
        if message[0] is not None:
            raise UserError(message[0])
        yield


@contextmanager
def hold(run_folder: Path, say: Callable[[str], None], *, patience: float = LEASE_SECONDS) -> Iterator[None]:
    """Keep every other trainer out of ``run_folder``; UserError names the one that is there.

    patience: seconds to wait for a trainer on another node, which may be dead.
    """
    path = run_folder / LOCK
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    try:
        _wait_for(handle, path, say, patience)
        yield
    finally:
        os.close(handle)


def _wait_for(handle: int, path: Path, say: Callable[[str], None], patience: float) -> None:
    deadline = time.monotonic() + patience
    said = False
    while not _locked(handle, path, say):
        host, words = _holder(handle)
        if host in (None, socket.gethostname()) or time.monotonic() >= deadline:
            raise UserError(f"another trainer is at work in {path.parent}: {words}; end it first ({path})")
        if not said:
            say(f"{path} is held by {words}; waiting {patience:.0f} s for it, in case that node is dead")
            said = True
        time.sleep(min(_RETRY_SECONDS, patience))


def _locked(handle: int, path: Path, say: Callable[[str], None]) -> bool:
    """Take the lock and sign it; False if another process has it."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sign(handle)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _NO_LOCKS_HERE:
            raise UserError(f"cannot lock {path}: {error.strerror}") from None
        say(f"{path} cannot be locked here ({error.strerror}): nothing keeps a second trainer out of this run")
    return True


def _sign(handle: int) -> None:
    """Say in the file who holds the lock; only people and refused trainers read it."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    signature = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(signature).encode(), 0)


def _holder(handle: int) -> tuple[str | None, str]:
    """The other trainer's host, and the whole of it in words; no host if it has not signed yet."""
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        return str(holder["host"]), f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return None, "a process that has not said its name yet"
