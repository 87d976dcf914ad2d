"""``megatron-eagle compare``: runs beside one another."""

import argparse
from pathlib import Path

from megatron_eagle.cli.common import Verbs, verb


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "compare",
        "show what differs between runs, and what came of it",
        "Prints each stage's loss, speed, padding, time and memory, and every key of the recipe, package and machine\n"
        "that differs; writes one page with the curves over each other, and the same as a PNG.",
        "  megatron-eagle compare runs/demo runs/demo-curated\n",
    )
    parser.add_argument("run_folders", type=Path, nargs="+", metavar="RUN", help="run folders, <runs>/<recipe's name>")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), help="the page; the PNG lies beside it (compare.html)"
    )
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> None:
    from megatron_eagle.runs.compare import as_text, compare, write_page
    from megatron_eagle.runs.found import read_run

    found = compare([read_run(folder) for folder in options.run_folders])
    print(as_text(found))
    write_page(found, options.out)
    print(f"\n{options.out}, {options.out.with_suffix('.png')}")
