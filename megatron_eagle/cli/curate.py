"""``megatron-eagle curate``: sources through a plan's operators, and what happened to a sample."""

import argparse
import os
from pathlib import Path

from megatron_eagle.cli.common import Verbs, count, positive_int, verb
from megatron_eagle.errors import UserError


def add(verbs: Verbs) -> None:
    """Declare the verb, its actions and their arguments; without an action's name it runs a plan."""
    parser = verb(
        verbs,
        "curate",
        "filter sources by a plan, with the fate of every sample on record",
        "'curate PLAN OUT' runs a plan, 'curate explain OUT SAMPLE_ID' says what happened to a sample, 'curate\n"
        "operators' lists what plans may use, 'curate synthesise OUT' makes pages and charts. Each has --help\n"
        "(docs/curation.md).",
        "  megatron-eagle curate plan.yaml curated --workers 8\n  megatron-eagle curate explain curated chart-000017\n",
    )
    parser.default_verb = "run"  # type: ignore[attr-defined]
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    run = verb(
        actions,
        "run",
        "run a plan (also without this word)",
        "Reads the sources of PLAN, runs its operators, and writes into OUT, which appears whole when all is done:\n"
        "  kept/SOURCE/samples.jsonl   what is left of each source, for 'data build'; media are linked, not copied\n"
        "  ledger.parquet              every decision: sample, turn, operator, reason, scores, text before and after\n"
        "  report.html, summary.json   what became of each source, with examples\n"
        "  blend.yaml                  the blend of a recipe's stage\n"
        "After a kill the same command goes on where it was; the output is the same bytes for any number of workers.",
        "  megatron-eagle curate plan.yaml curated --workers 8 --build\n",
    )
    run.add_argument("plan", type=Path, metavar="PLAN", help="YAML file with sources and operators")
    run.add_argument("out", type=Path, metavar="OUT")
    run.add_argument("--workers", type=positive_int, default=1, help="processes that work on blocks (default: 1)")
    run.add_argument("--build", action="store_true", help="also build OUT/shards/SOURCE of what is kept")
    run.add_argument(
        "--key-variable",
        metavar="NAME",
        help="environment variable with the key of endpoints that have no key_file (docs/curation_augmentation.md)",
    )
    run.set_defaults(run=_run)
    explain = verb(
        actions,
        "explain",
        "everything that happened to one sample",
        "Prints every row of the ledger about a sample. SAMPLE_ID is its id, or SOURCE/ID where sources share ids.",
        "  megatron-eagle curate explain curated chart-000017\n",
    )
    explain.add_argument("out", type=Path, metavar="OUT")
    explain.add_argument("sample", metavar="SAMPLE_ID")
    explain.set_defaults(run=_explain)
    _add_synthesise(actions)
    operators = verb(
        actions,
        "operators",
        "list the operators and their settings",
        "Prints every operator with its settings and their defaults.",
        "  megatron-eagle curate operators\n",
    )
    operators.set_defaults(run=_operators)


def _add_synthesise(actions: Verbs) -> None:
    parser = verb(
        actions,
        "synthesise",
        "make pages of text and charts, with what is in them",
        "Writes OUT/samples.jsonl and OUT/images for 'data build' or a plan: pages of text in several layouts,\n"
        "scripts and fonts, with noise (--pages), and charts with their tables (--charts). The same arguments give\n"
        "the same bytes.",
        "  megatron-eagle curate synthesise made --pages 1000 --charts 1000 --seed 1\n",
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--pages", type=count, default=0, metavar="N", help="pages of text (default: 0)")
    parser.add_argument("--charts", type=count, default=0, metavar="N", help="charts (default: 0)")
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="of everything that is drawn (default: 0)")
    parser.add_argument(
        "--scripts", default="latin,cyrillic,greek", metavar="NAMES",
        help="of pages: latin, cyrillic, greek, han, kana, hangul (default: the first three)",
    )  # fmt: skip
    parser.add_argument(
        "--fonts", type=Path, action="append", default=[], metavar="FOLDER",
        help="a folder with more fonts than matplotlib brings; may be given again",
    )  # fmt: skip
    parser.add_argument("--workers", type=positive_int, default=1, metavar="N", help="processes (default: 1)")
    parser.set_defaults(run=_synthesise)


def _run(options: argparse.Namespace) -> None:
    from megatron_eagle.curation.asking import give_key
    from megatron_eagle.curation.engine import curate
    from megatron_eagle.curation.plan import load_plan

    plan = load_plan(options.plan)
    if options.key_variable is not None:
        give_key(plan.steps, _variable(options.key_variable))
    summary = curate(plan, options.out, workers=options.workers, build=options.build)
    for source in summary.sources:
        print(
            f"{source.name}: {source.read} read = {source.used} used + {source.rejected} rejected + {source.left} left"
        )
    print(
        f"{options.out}: {summary.total('used')} of {summary.total('read')} samples kept; see {options.out}/report.html"
    )


def _variable(name: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise UserError(f"--key-variable {name}: the environment has no such variable, or it is empty")
    return value


def _explain(options: argparse.Namespace) -> None:
    from megatron_eagle.curation.ledger import explain

    for line in explain(options.out, options.sample):
        print(line)


def _synthesise(options: argparse.Namespace) -> None:
    from megatron_eagle.curation.synthesis.write import Synthesis, synthesise

    scripts = tuple(name.strip() for name in options.scripts.split(",") if name.strip())
    wanted = Synthesis(options.seed, options.pages, options.charts, scripts, tuple(options.fonts))
    file = synthesise(wanted, options.out, workers=options.workers)
    print(f"{file}: {wanted.pages} pages and {wanted.charts} charts")


def _operators(options: argparse.Namespace) -> None:
    from megatron_eagle.curation.operator import describe_operators

    for line in describe_operators():
        print(line)
