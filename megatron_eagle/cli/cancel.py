"""``megatron-eagle cancel``: end what of a run is in Slurm's queue."""

import argparse
from pathlib import Path

from megatron_eagle.cli.common import Verbs, verb


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "cancel",
        "cancel all jobs of a submitted run",
        "Jobs are found by the run's folder, also those that a submission which was killed has left behind. What is\n"
        "saved stays: submit again to go on from it.",
        "  megatron-eagle cancel runs/eagle2-9b\n",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder, <runs>/<name of the recipe>")
    parser.set_defaults(run=_cancel)


def _cancel(options: argparse.Namespace) -> None:
    from megatron_eagle.cluster.queueing import cancel_run

    for job in cancel_run(options.run_folder):
        print(f"cancelled: job {job}")
