"""``megatron-eagle VERB``: the command line, one function a verb, each with --help and a worked example.

It only reads arguments, calls the room that does the work, and turns errors that are the user's to mend into one line.
Imports of the heavy rooms stay inside the verbs, so that --help answers at once.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_eagle import __version__
from megatron_eagle.errors import UserError

if TYPE_CHECKING:
    from megatron_eagle.platform import Platform

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one verb; exits 0, 2 after a UserError (one line on stderr), 130 after Ctrl-C."""
    options = _parse(arguments)
    try:
        options.run(options)
    except UserError as error:
        _print_once(f"megatron-eagle: {error}")
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the verb; KEY=VALUE overrides may stand anywhere among the options."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    strange = [argument for argument in rest if argument.startswith("-") or "=" not in argument]
    if strange or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _print_once(line: str) -> None:
    # Every process of a torchrun job meets the same bad recipe; the first one says so.
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-eagle",
        description="Trains Eagle 2 and Eagle 2.5 vision-language models on Megatron-Core.",
        epilog="'megatron-eagle VERB --help' explains a verb and shows an example.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-eagle {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    _add_train(verbs)
    _add_evaluate(verbs)
    _add_data(verbs)
    _add_recipe(verbs)
    _add_demo(verbs)
    return parser


def _verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str, text: str, example: str
) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        help=summary,
        description=text,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="YAML file of the run, e.g. examples/tiny/recipe.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="values to change, e.g. layout.tp=2 stages.stage1.steps=10"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder that holds the run folders (default: runs)"
    )


def _add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=int,
        default=None,
        metavar="N",
        help="start N processes on this machine; without it this is one process, or one of torchrun's or srun's",
    )
    parser.add_argument(
        "--trace-platform", action="store_true", help="list what was redirected to run Megatron-Core without a GPU"
    )


def _add_train(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _verb(
        verbs,
        "train",
        "train one stage of a recipe",
        "Trains a stage to its last step, starting from the stage before it. Given again after any interruption, the\n"
        "same command continues from the newest checkpoint; given after the last step, it does nothing.",
        "  megatron-eagle train examples/tiny/recipe.yaml --stage stage1 --processes 2\n"
        "  torchrun --nproc-per-node 8 -m megatron_eagle train examples/eagle2-1b/recipe.yaml --stage stage1.5\n",
    )
    _add_recipe_arguments(parser)
    parser.add_argument("--stage", required=True, help="name of the stage, e.g. stage1.5")
    _add_launch_arguments(parser)
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    platform = _platform(options)
    from megatron_eagle.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    recipe.stage(options.stage)
    if _is_first():
        return _launch(options.processes or 1)
    from megatron_eagle.training.loop import RunFolder, train_stage

    train_stage(recipe, options.stage, RunFolder(options.runs / recipe.name), platform)
    if options.trace_platform:
        _print_once(platform.report())


def _add_evaluate(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _verb(
        verbs,
        "evaluate",
        "answer the questions of a data set and score them",
        "Answers every question greedily, once with its images and once with them blanked, and counts exact matches\n"
        "per task. Writes predictions.jsonl and accuracy.json.",
        "  megatron-eagle evaluate examples/tiny/recipe.yaml --data runs/demo/data/heldout --processes 2\n",
    )
    _add_recipe_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="data set folder made by 'data build'")
    parser.add_argument(
        "--stage", default=None, help="stage whose newest checkpoint is used (default: the recipe's last)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the results (default: <runs>/<name>/evaluation)"
    )
    parser.add_argument("--answer-tokens", type=int, default=16, help="longest answer in tokens (default: 16)")
    _add_launch_arguments(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    platform = _platform(options)
    from megatron_eagle.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    stage = recipe.stage(options.stage) if options.stage else recipe.stages[-1]
    if _is_first():
        return _launch(options.processes or 1)
    from megatron_eagle.evaluation.score import evaluate
    from megatron_eagle.training.loop import RunFolder

    run_folder = RunFolder(options.runs / recipe.name)
    evaluate(
        recipe,
        stage,
        run_folder,
        options.data,
        options.out or run_folder.path / "evaluation",
        platform,
        options.answer_tokens,
    )
    if options.trace_platform:
        _print_once(platform.report())


def _add_data(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _verb(
        verbs,
        "data",
        "build and check data sets",
        "Turns conversation JSONL into Energon shards, and checks shards.",
        "  megatron-eagle data build samples.jsonl data/train\n  megatron-eagle data check data/train\n",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    build = _verb(
        actions,
        "build",
        "conversation JSONL to Energon shards",
        "Each line is one sample in the LLaVA/ShareGPT form\n"
        '{"id", "image": path or list of paths, "conversations": [{"from", "value"}]}.\n'
        "Image paths are relative to the JSONL's folder. Bad samples are listed in OUT/rejected.jsonl with line, id\n"
        "and reason; the good ones are kept.",
        "  megatron-eagle data build samples.jsonl data/train --max-rejected 10\n",
    )
    build.add_argument("samples", type=Path, metavar="SAMPLES.jsonl")
    build.add_argument("out", type=Path, metavar="OUT")
    build.add_argument("--media-root", type=Path, default=None, help="folder of the images (default: the JSONL's)")
    build.add_argument(
        "--max-rejected", type=int, default=0, help="fail when more samples than this are bad (default: 0)"
    )
    build.add_argument("--samples-per-shard", type=int, default=1000, help="samples in one tar file (default: 1000)")
    build.set_defaults(run=_data_build)
    check = _verb(
        actions,
        "check",
        "open a built data set and count it",
        "Opens every shard through Energon, reads every sample and compares the counts with the index.",
        "  megatron-eagle data check data/train\n",
    )
    check.add_argument("folder", type=Path, metavar="FOLDER")
    check.set_defaults(run=_data_check)


def _data_build(options: argparse.Namespace) -> None:
    from megatron_eagle.data.build import build_dataset

    report = build_dataset(
        options.samples,
        options.out,
        media_root=options.media_root,
        max_rejected=options.max_rejected,
        samples_per_shard=options.samples_per_shard,
    )
    print(f"{options.out}: {report.read} samples read, {report.written} written, {report.rejected} rejected")


def _data_check(options: argparse.Namespace) -> None:
    from megatron_eagle.data.build import check_dataset

    print(f"{options.folder}: {check_dataset(options.folder)} samples, all readable")


def _add_recipe(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _verb(
        verbs,
        "recipe",
        "check a recipe and print it with every default filled in",
        "Reads the recipe as 'train' would, refuses what cannot work, and prints all of it as YAML.",
        "  megatron-eagle recipe examples/eagle2-9b/recipe.yaml layout.tp=4\n",
    )
    _add_recipe_arguments(parser)
    parser.set_defaults(run=_recipe)


def _recipe(options: argparse.Namespace) -> None:
    from megatron_eagle.recipe import load_recipe, recipe_as_yaml

    print(recipe_as_yaml(load_recipe(options.recipe, options.overrides)), end="")


def _add_demo(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _verb(
        verbs,
        "demo",
        "train the embedded Eagle through its stages and write a report",
        "Generates the embedded data set, trains a small but structurally complete Eagle through stage1, stage1.5 and\n"
        "stage2 with two Megatron processes, answers questions about images it never saw, and writes report.html and\n"
        "summary.json. Given again, it continues where it was.",
        "  megatron-eagle demo --out runs/demo\n",
    )
    parser.add_argument(
        "--recipe", type=Path, default=Path("examples/tiny/recipe.yaml"), help="recipe to train (default: the tiny one)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of the recipe to change")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder that holds the run folders (default: runs)"
    )
    parser.add_argument("--processes", type=int, default=2, help="Megatron processes (default: 2)")
    parser.add_argument(
        "--setup-seconds", type=float, default=0.0, help="seconds already spent on the environment, for the summary"
    )
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    from megatron_eagle.demo.run import run_demo

    run_demo(options.recipe, options.overrides, options.runs, options.processes, options.setup_seconds)


def _platform(options: argparse.Namespace) -> "Platform":
    """The platform of this process. What dependencies warn their own developers about is left unsaid."""
    for noisy in (r"megatron\.core", r"torch\.distributed", r"torch\.utils\.data"):
        warnings.filterwarnings("ignore", module=noisy)
    from megatron_eagle.platform import install

    return install(trace=options.trace_platform, local_rank=int(os.environ.get("LOCAL_RANK", "0")))


def _is_first() -> bool:
    """Whether this process is the one a person started, not one that a launcher started for them."""
    return "RANK" not in os.environ


def _launch(processes: int) -> None:
    """Start this very command ``processes`` times on this machine and wait; raises SystemExit if one of them fails."""
    from megatron_eagle.launch import launch

    sys.exit(launch(processes, _without_processes(sys.argv[1:])))


def _without_processes(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--processes":
            skip = True
        elif not argument.startswith("--processes="):
            kept.append(argument)
    return kept
