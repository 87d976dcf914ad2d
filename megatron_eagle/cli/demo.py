"""``megatron-eagle demo``: the embedded run from nothing to its report."""

import argparse
from pathlib import Path

from megatron_eagle.cli.common import Verbs, not_negative, positive_int, verb


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "demo",
        "train the embedded Eagle through its stages and write a report",
        "Generates the embedded data set, trains a small but structurally complete Eagle through stage1, stage1.5 and\n"
        "stage2 with two Megatron processes, answers questions about images it never saw, and writes report.html and\n"
        "summary.json. Given again, it continues where it was.",
        "  megatron-eagle demo --runs runs\n",
    )
    parser.add_argument(
        "--recipe", type=Path, default=Path("tiny"), metavar="RECIPE", help="recipe to train (default: tiny)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of the recipe to change")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder that holds the run folders (default: runs)"
    )
    parser.add_argument("--processes", type=positive_int, default=2, help="Megatron processes (default: 2)")
    parser.add_argument(
        "--setup-seconds",
        type=not_negative,
        default=0.0,
        help="seconds already spent on the environment, for the summary",
    )
    parser.set_defaults(run=_demo, kept=lambda options: f"what is finished is kept in {options.runs}")


def _demo(options: argparse.Namespace) -> None:
    from megatron_eagle.demo.run import run_demo

    run_demo(options.recipe, options.overrides, options.runs, options.processes, options.setup_seconds)
