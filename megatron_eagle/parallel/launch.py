"""Starts a command in several processes on one machine, for people without torchrun in their fingers.

The processes find each other by the variables torchrun would set. Why not torchrun's own launcher as a library: it puts
every process into a session of its own, so that a killed launcher (or a closed terminal) leaves them training unseen,
and it reports a failure in a page of its own after the one line that explains it.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0
LAST_WORDS_SECONDS = 5.0  # to those that lost another one, which they notice at once
STOPPING = "ending the step and saving it; Ctrl-C again aborts"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launch(processes: int, arguments: Sequence[str], *, saves: bool = False) -> int:
    """Run ``python -m megatron_eagle <arguments>`` in ``processes`` processes and wait for them.

    When one fails, the others have some seconds to say so and are ended. A process that was ended by a signal is named
    on stderr, because it could not speak for itself. Returns the exit code of the first to fail (128 + signal number
    after a signal), or 0.

    A KeyboardInterrupt ends them and is raised. saves: instead they are asked to stop (SIGTERM) and waited for; it is
    raised all the same if one of them did not know yet how to do that.
    """
    with reserved_port() as port:
        running = [_start(process_variables(rank, processes, port), arguments) for rank in range(processes)]
        return _wait(running, saves)


def _wait(running: Sequence["subprocess.Popen[bytes]"], saves: bool) -> int:
    grace = LAST_WORDS_SECONDS
    try:
        rank, code = _first_to_fail(running)
        return _explain(rank, code)
    except KeyboardInterrupt:
        if not saves:
            grace = 0.0
            raise
        print(f"megatron-eagle: {STOPPING}", file=sys.stderr, flush=True)
        for process in running:
            process.terminate()
        grace = GRACE_SECONDS
        _, code = _first_to_fail(running)
        if code == -signal.SIGTERM:
            raise
        return code
    finally:
        _end(running, grace)


def _first_to_fail(running: Sequence["subprocess.Popen[bytes]"]) -> tuple[int, int]:
    """(rank, code) of the first process to fail, or (0, 0) once all have ended well."""
    while any(process.poll() is None for process in running):
        for rank, process in enumerate(running):
            if process.poll():
                return rank, process.returncode
        time.sleep(POLL_SECONDS)
    return next(((rank, process.returncode) for rank, process in enumerate(running) if process.returncode), (0, 0))


def process_variables(rank: int, processes: int, port: int = 0) -> dict[str, str]:
    """The variables by which torch.distributed finds the other processes of this machine; one process needs no port."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _start(variables: dict[str, str], arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
    # Processes that share cores must not each start a thread per core (torchrun does the same); a set value is kept.
    threads = str(max(1, (os.cpu_count() or 1) // int(variables["WORLD_SIZE"])))
    environment = {"OMP_NUM_THREADS": threads} | os.environ | variables
    command = [sys.executable, "-m", "megatron_eagle", *arguments]
    return subprocess.Popen(command, env=environment, preexec_fn=obey_parent)


def obey_parent() -> None:
    """``die_with_parent``, and Ctrl-C, which a terminal sends to both, is for the parent to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()


def die_with_parent() -> None:
    """From now on this process is killed when the one that started it ends; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _explain(rank: int, code: int) -> int:
    if code < 0:
        print(f"megatron-eagle: process {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
        return 128 - code
    return code


def _end(running: Sequence["subprocess.Popen[bytes]"], grace: float) -> None:
    """Kill those that have not ended by themselves after ``grace`` seconds."""
    deadline = time.monotonic() + grace
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port on which a process that is told it can listen, seconds later, and that nobody else is given meanwhile.

    Linux gives no port away that is bound, and lets others listen on one that is only bound if both ask for it
    (SO_REUSEADDR), as PyTorch's store does.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])
