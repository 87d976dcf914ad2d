"""``megatron-eagle status``: the chain of a submitted run as a table."""

import argparse
import time
from pathlib import Path

from megatron_eagle.cli.common import Verbs, seconds, verb


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "status",
        "show where a submitted chain is",
        "One line a stage: state of its job, step, loss, speed, time left, how often it was started again and why.",
        "  megatron-eagle status runs/eagle2-9b --watch\n",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder, <runs>/<name of the recipe>")
    parser.add_argument("--watch", action="store_true", help="refresh until the chain has ended")
    parser.add_argument("--every", type=seconds, default=10.0, metavar="SECONDS", help="how often to refresh")
    parser.set_defaults(run=_status)


def _status(options: argparse.Namespace) -> None:
    from megatron_eagle.cluster.status import OVER, read_status, table

    while True:
        rows = read_status(options.run_folder, **({"patience": 0.0} if options.watch else {}))  # it asks again itself
        if options.watch:
            print("\033[H\033[J", end="")  # cursor home, clear what is below
        print(table(rows), flush=True)
        if not options.watch or all(row.state in OVER for row in rows):
            return
        time.sleep(options.every)
