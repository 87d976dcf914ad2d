"""``megatron-eagle status``: the chain of a submitted run as a table."""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table, for programs")
    parser.add_argument("--watch", action="store_true", help="refresh until the chain has ended")
    parser.add_argument("--every", type=seconds, default=10.0, metavar="SECONDS", help="how often to refresh")
    parser.set_defaults(run=_status)


def _status(options: argparse.Namespace) -> None:
    from megatron_eagle.cluster.status import OVER, read_status, table

    patience = {"patience": 0.0} if options.watch else {}  # it asks again itself
    while True:
        notes: list[str] = []
        rows = read_status(options.run_folder, notes.append, **patience)
        if options.json:
            stages = [{name: _plain(value) for name, value in asdict(row).items()} for row in rows]
            print(json.dumps({"run": str(options.run_folder), "notes": notes, "stages": stages}), flush=True)
        else:
            if options.watch and sys.stdout.isatty():
                print("\033[H\033[J", end="")  # cursor home, clear what is below
            print("\n".join([table(rows), *notes]), flush=True)
        if not options.watch or all(row.state in OVER for row in rows):
            return
        time.sleep(options.every)


def _plain(value: Any) -> Any:
    """JSON has no NaN: a loss that is no number is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
