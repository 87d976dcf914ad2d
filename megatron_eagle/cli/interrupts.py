"""Ctrl-C and SIGTERM: a verb ends at once and says in one line what of its work is kept and how to go on.

Everything on disk is right at every moment, because a machine may die: nothing has to be saved, only helpers ended.
``train`` alone has something to save: it takes the signals itself once it trains (``training.watchdog``).
"""

import argparse
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_eagle.cli.common import print_once

Kept = Callable[[argparse.Namespace], str]  # what a verb has kept when it is interrupted; its default ``kept``


class Interrupted(KeyboardInterrupt):
    """A signal asks for an end; a KeyboardInterrupt, so that what cleans up after Ctrl-C does so after SIGTERM."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


@contextmanager
def interruptible(options: argparse.Namespace) -> Iterator[None]:
    """Exits 130 after Ctrl-C and, in a verb that says what it has ``kept``, 143 after SIGTERM, with a line about it.

    A second Ctrl-C ends the process without waiting for anything. A signal that is ignored (nohup) stays so.
    """
    kept: Kept | None = getattr(options, "kept", None)
    if kept is None or threading.current_thread() is not threading.main_thread():
        try:
            yield
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        return
    came: list[signal.Signals] = []
    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _handler(came, lambda: kept(options))) for number in heard}
    try:
        yield
    except KeyboardInterrupt:
        number = came[0] if came else signal.SIGINT
        print_once(f"megatron-eagle: interrupted ({number.name}): {kept(options)}; {to_continue()}")
        sys.exit(128 + number)  # the handlers stay: Ctrl-C while threads are waited for is an end as well
    finally:
        if not came:
            for number, handler in before.items():
                signal.signal(number, handler)


def _handler(came: list[signal.Signals], kept: Callable[[], str]) -> Callable[[int, FrameType | None], None]:
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # forked: on Ctrl-C the one that forked it decides, SIGTERM is how it ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if came:
            if number == signal.SIGINT:  # no print: it may have come amid one
                os.write(2, f"megatron-eagle: aborted: {kept()}; {to_continue()}\n".encode())
                os._exit(128 + number)
            return
        came.append(signal.Signals(number))
        for child in multiprocessing.active_children():
            if not child.daemon:  # of a pool, which would wait for them; daemons are ended at exit
                child.kill()
        raise Interrupted(came[0])

    return handle


def to_continue() -> str:
    """How this process's command line goes on; that of torchrun or srun is not known here."""
    if "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ:
        return "continue with the same command"
    return f"continue with: {shlex.join(['megatron-eagle', *sys.argv[1:]])}"
