"""``megatron-eagle curate``: sources through a plan's operators, and what happened to a sample."""

import argparse
import os
from pathlib import Path

from megatron_eagle.cli.common import Verbs, count, fraction, positive_int, verb
from megatron_eagle.errors import UserError


def add(verbs: Verbs) -> None:
    """Declare the verb, its actions and their arguments; without an action's name it runs a plan."""
    parser = verb(
        verbs,
        "curate",
        "filter sources by a plan, with the fate of every sample on record",
        "'curate PLAN OUT' runs a plan, 'curate explain OUT SAMPLE_ID' says what happened to a sample, 'curate admit\n"
        "NEW OUT --pool POOL' whether a source adds anything, 'curate synthesise OUT' makes pages and charts,\n"
        "'curate operators' lists what plans may use. Each action has --help (docs/curation.md).",
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
        "After a kill the same command goes on where it was; the output is the same bytes for any number of workers,\n"
        "processes of this machine or of a Ray cluster.",
        "  megatron-eagle curate plan.yaml curated --workers 8 --build\n",
        progress=True,
    )
    run.add_argument("plan", type=Path, metavar="PLAN", help="YAML file with sources and operators")
    run.add_argument("out", type=Path, metavar="OUT")
    run.add_argument("--workers", type=positive_int, default=1, help="processes that work on blocks (default: 1)")
    run.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="where they are: processes of this machine, or of a Ray cluster (pip install '.[ray]')",
    )
    run.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of the Ray cluster: 'auto' is the one that this machine is part of (default: one on this machine alone)",
    )
    run.add_argument("--build", action="store_true", help="also build OUT/shards/SOURCE of what is kept")
    run.add_argument(
        "--key-variable",
        metavar="NAME",
        help="environment variable with the key of endpoints that have no key_file (docs/curation_augmentation.md)",
    )
    run.set_defaults(run=_run, kept=_kept)
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
    _add_admit(actions)
    _add_synthesise(actions)
    operators = verb(
        actions,
        "operators",
        "list the operators and their settings",
        "Prints every operator with its settings and their defaults.",
        "  megatron-eagle curate operators\n",
    )
    operators.set_defaults(run=_operators)


def _kept(options: argparse.Namespace) -> str:
    return f"finished blocks are kept in {options.out.parent}/.{options.out.name}.partial"


def _add_admit(actions: Verbs) -> None:
    admit = verb(
        actions,
        "admit",
        "does a source add anything to a pool: its similarity (Eq. 1)",
        "Compares NEW with POOL by Eq. 1 of Eagle 2, category by category: the mean over NEW's samples of the best\n"
        "product of image and text similarity in POOL. High is redundant. NEW and POOL are records ('data build'\n"
        "reads them), a finished curation or a plan, [CATEGORY=]PATH each (category 'general' unless they say one).\n"
        "OUT/report.html shows the best matches side by side, OUT/ledger.parquet has those of every sample.",
        "  megatron-eagle curate admit chart=new/samples.jsonl admitted --pool curated \\\n"
        "      --images sscd_disc_mixup.torchscript.pt --texts all-mpnet-base-v2\n",
        progress=True,
    )
    admit.add_argument("new", metavar="NEW")
    admit.add_argument("out", type=Path, metavar="OUT")
    admit.add_argument("--pool", required=True, nargs="+", metavar="POOL")
    admit.add_argument("--images", required=True, metavar="MODEL", help="TorchScript file, or folder of CLIP or SigLIP")
    admit.add_argument(
        "--texts", required=True, metavar="MODEL", help="folder of sentence-transformers, CLIP or SigLIP"
    )
    admit.add_argument("--category", nargs="+", default=(), metavar="NAME", help="only NEW's sources of these")
    admit.add_argument(
        "--redundant", type=fraction, default=0.5, help="from which S a source adds little (default: 0.5)"
    )
    admit.add_argument("--top", type=positive_int, default=3, help="matches of each sample (default: 3)")
    admit.add_argument("--shown", type=count, default=8, help="samples in the report (default: 8)")
    admit.add_argument(
        "--negative",
        choices=("zero", "literal"),
        default="zero",
        help="cosines below 0 count as 0, or as the formula has them (default: zero)",
    )
    admit.add_argument(
        "--cache", default="vectors", help="folder of vectors, found again by content (default: vectors)"
    )
    admit.add_argument("--batch", type=positive_int, default=32, help="contents a model is given at once (default: 32)")
    admit.add_argument("--side", type=positive_int, default=320, help="pixels a TorchScript file takes (default: 320)")
    admit.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    admit.add_argument("--workers", type=positive_int, default=1, help="processes that make vectors (default: 1)")
    admit.set_defaults(run=_admit, kept=_kept)


def _add_synthesise(actions: Verbs) -> None:
    parser = verb(
        actions,
        "synthesise",
        "make pages of text and charts, with what is in them",
        "Writes OUT/samples.jsonl and OUT/images for 'data build' or a plan: pages of text in several layouts,\n"
        "scripts and fonts, with noise (--pages), and charts with their tables (--charts). The same arguments give\n"
        "the same bytes.",
        "  megatron-eagle curate synthesise made --pages 1000 --charts 1000 --seed 1\n",
        progress=True,
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
    parser.set_defaults(
        run=_synthesise, kept=lambda options: f"pictures without records are in {options.out}, remove it first"
    )


def _run(options: argparse.Namespace) -> None:
    from megatron_eagle.curation.asking import give_key
    from megatron_eagle.curation.engine import curate
    from megatron_eagle.curation.plan import load_plan

    if options.ray_address and options.engine != "ray":
        raise UserError(f"--ray-address {options.ray_address} goes with --engine ray")
    plan = load_plan(options.plan)
    if options.key_variable is not None:
        give_key(plan.steps, _variable(options.key_variable))
    summary = curate(
        plan,
        options.out,
        workers=options.workers,
        build=options.build,
        engine=options.engine,
        ray_address=options.ray_address or "local",
    )
    for source in summary.sources:
        print(
            f"{source.name}: {source.read} read = {source.used} used + {source.rejected} rejected + {source.left} left"
        )
    print(
        f"{options.out}: {summary.total('used')} of {summary.total('read')} samples kept; see {options.out}/report.html"
    )


def _admit(options: argparse.Namespace) -> None:
    from megatron_eagle.curation.admission import Admission, admit

    embeddings = {name: getattr(options, name) for name in ("images", "texts", "cache", "batch", "side", "device")}
    similarity = {name: getattr(options, name) for name in ("redundant", "top", "shown", "negative")}
    asked = Admission(options.new, tuple(options.pool), embeddings, similarity, tuple(options.category))
    for source in admit(asked, options.out, workers=options.workers).sources:
        print(f"{source.name}: {source.read} samples read, {source.rejected} of them rejected")
        for note in source.notes:
            print(f"{source.name}: {note}")
    print(f"{options.out}/report.html shows the best matches side by side")


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
    from megatron_eagle.text import folded

    for line in describe_operators():
        print(folded(line, "    "))
