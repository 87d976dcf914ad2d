"""``python -m megatron_eagle``, the form in which torchrun starts the command line, and what the command calls."""

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
        main()
    except KeyboardInterrupt:  # before a verb was found, or after it
        sys.exit(128 + signal.SIGINT)


# The guard matters: Megatron's checkpoint writer starts helpers that import this module again.
if __name__ == "__main__":
    run()
