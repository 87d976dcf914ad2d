"""``megatron-eagle runs``: which runs there are, and the checkpoints that nothing goes on from."""

import argparse
from pathlib import Path

from megatron_eagle.cli.common import Verbs, verb


def add(verbs: Verbs) -> None:
    """Declare the verb and its actions."""
    parser = verb(
        verbs,
        "runs",
        "list the runs of a folder, or free the disk of old checkpoints",
        "list: a line for each run: its stages and steps, last loss, size.\n"
        "clean: which checkpoints of a run nothing goes on from; deletes them with --yes.",
        "  megatron-eagle runs list\n  megatron-eagle runs clean runs/demo\n",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    listing = verb(
        actions, "list", "a line for each run", "Reads what the runs wrote.", "  megatron-eagle runs list --runs runs\n"
    )
    listing.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders (default: runs)")
    listing.set_defaults(run=_list)
    clean = verb(
        actions,
        "clean",
        "delete checkpoints that nothing goes on from",
        "Keeps the newest whole checkpoint of each stage. Says what would be deleted; deletes it with --yes. A\n"
        "trainer at work is not disturbed, but --fallback of 'train' finds older ones no more.",
        "  megatron-eagle runs clean runs/demo --yes\n",
    )
    clean.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder")
    clean.add_argument("--yes", action="store_true", help="delete what is listed")
    clean.set_defaults(run=_clean)


def _list(options: argparse.Namespace) -> None:
    from megatron_eagle.planning.report import narrow
    from megatron_eagle.runs.found import find_runs, read_run, size_of

    rows: list[list[str]] = []
    for folder in find_runs(options.runs):
        run = read_run(folder)
        for stage, records in run.metrics.items():
            last = records[-1]
            cells = [run.name, stage, f"{last.step}/{last.steps}", f"{last.loss:.4f}", f"{size_of(folder) / 1e9:.2f}"]
            rows.append(cells if not rows or rows[-1][0] != run.name else ["", *cells[1:-1], ""])
    print(narrow(["run", "stage", "steps", "last loss", "GB"], rows) if rows else f"no runs in {options.runs}")


def _clean(options: argparse.Namespace) -> None:
    import shutil

    from megatron_eagle.runs.found import old_checkpoints, read_run, size_of

    read_run(options.run_folder)
    old = list(old_checkpoints(options.run_folder))
    for path in old:
        print(f"{path}  {size_of(path) / 1e9:.2f} GB")
    total = sum(map(size_of, old)) / 1e9
    if not options.yes or not old:
        print(
            f"{len(old)} checkpoints, {total:.2f} GB, that no stage goes on from" + "; --yes deletes them" * bool(old)
        )
        return
    for path in old:
        shutil.rmtree(path)
    print(f"deleted {len(old)} checkpoints, {total:.2f} GB")
