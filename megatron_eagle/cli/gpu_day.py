"""``megatron-eagle gpu-day``: all that only a GPU can show, in one command and one report."""

import argparse
from pathlib import Path

from megatron_eagle.cli.common import Verbs, minutes, verb


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "gpu-day",
        "run, measure and report on one GPU what was proved on CPUs",
        "Runs every part (kernels, layouts, training beside transformers and the plan, checkpoints, ...) in a process\n"
        "of its own, without a network, and writes Markdown, JSON and a picture to OUT/<date>-<device>/. A part that\n"
        "fails or takes too long stops no other; the same command runs what is missing. docs/gpu_day.md says more.",
        "  megatron-eagle gpu-day benchmarks/gpu\n  megatron-eagle gpu-day /tmp/day --toy --part train_1b\n",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that holds the dated folders of reports")
    parser.add_argument(
        "--part", action="append", default=[], help="run this part, also if it is there; may be repeated"
    )
    parser.add_argument("--minutes", type=minutes, default=9.0, help="after which a part is ended (default: 9)")
    parser.add_argument(
        "--toy", action="store_true", help="sizes that a CPU runs in minutes, to try the command itself"
    )
    parser.set_defaults(run=_gpu_day)


def _gpu_day(options: argparse.Namespace) -> None:
    from megatron_eagle.errors import UserError
    from megatron_eagle.gpu_day.day import run_day
    from megatron_eagle.gpu_day.report import troubles, write_report

    folder = run_day(options.out, options.part, toy=options.toy, minutes=options.minutes, after_each=write_report)
    print(write_report(folder), flush=True)
    found = troubles(folder)
    if found:
        raise UserError(f"{len(found)} things are not as they should be, the first: {found[0]}")
