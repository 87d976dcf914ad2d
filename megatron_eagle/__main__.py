"""``python -m megatron_eagle``, the form in which torchrun starts the command line, and what the command calls."""

import os
import select
import signal
import sys
from typing import NoReturn


def run() -> NoReturn:
    """The command line; Ctrl-C is an end without a traceback from the first import on."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from megatron_eagle.cli import main

    signal.signal(signal.SIGINT, handler)
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # here, where an error can be answered
    except KeyboardInterrupt:  # before a verb was found, or after it
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        _leave_if_nobody_reads()
        raise


def _leave_if_nobody_reads() -> None:
    """Exit as SIGPIPE ends other programs if standard output is a pipe whose reader has gone, as ``head`` does."""
    ends = select.poll()
    ends.register(sys.stdout.fileno(), 0)
    if any(event & select.POLLERR for _, event in ends.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        sys.exit(128 + signal.SIGPIPE)


# The guard matters: Megatron's checkpoint writer starts helpers that import this module again.
if __name__ == "__main__":
    run()
