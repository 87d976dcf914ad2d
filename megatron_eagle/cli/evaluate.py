"""``megatron-eagle evaluate``: answer the questions of a data set, or of benchmarks, and score them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eagle.cli.common import (
    Verbs,
    add_launch_arguments,
    add_recipe_arguments,
    add_sampling_arguments,
    become_part_of_a_run,
    open_platform,
    positive_int,
    print_once,
    sampling_of,
    verb,
)
from megatron_eagle.errors import UserError
from megatron_eagle.importing import importing

if TYPE_CHECKING:
    from megatron_eagle.endpoint.settings import Endpoint
    from megatron_eagle.evaluation.benchmarks.locate import Request

ANSWER_TOKENS = 16


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "evaluate",
        "answer the questions of a data set or of benchmarks and score them",
        "Answers every question, by the likeliest tokens unless --temperature draws them, once with its\n"
        "images and once with them blanked, and counts exact matches per task. Writes predictions.jsonl and\n"
        "accuracy.json.\n\n"
        "With --benchmarks, reads their TSV, Parquet or lmms-eval files from the folder --data, scores each by its\n"
        "own rule, and writes scores.json and benchmarks.html beside the predictions.",
        "  megatron-eagle evaluate tiny --data runs/demo/data/heldout --processes 2\n"
        "  megatron-eagle evaluate eagle2-9b --benchmarks docvqa,mmmu=MMMU_DEV_VAL.tsv --data LMUData\n"
        "  megatron-eagle evaluate eagle2-9b-lora --data data/held-out --before\n",
        progress=True,
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--data", type=Path, required=True, help="data set folder made by 'data build', or that of benchmark files"
    )
    parser.add_argument(
        "--benchmarks",
        metavar="NAME[=FILE],...",
        default=None,
        help="benchmarks to ask; a file or pattern within --data where its name does not say which it is",
    )
    parser.add_argument(
        "--limit", type=positive_int, default=None, help="the first so many questions of each benchmark"
    )
    parser.add_argument("--blank", action="store_true", help="with --benchmarks: ask once more with the images blanked")
    parser.add_argument(
        "--judge",
        nargs=2,
        metavar=("URL", "MODEL"),
        default=None,
        help="with --benchmarks: an OpenAI-compatible endpoint that is asked what no rule can tell (MMVet, MathVista)",
    )
    parser.add_argument(
        "--judge-key", metavar="FILE", default=None, help="file with the key of --judge, if it needs one"
    )
    parser.add_argument(
        "--stage", default=None, help="stage whose newest checkpoint is used (default: the recipe's last)"
    )
    parser.add_argument(
        "--before", action="store_true", help="ask what the stage starts from: the stage before, or the released model"
    )
    parser.add_argument(
        "--ema", action="store_true", help="ask the running mean of the weights, of a stage with the key ema"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder for the results (default: <runs>/<name>/evaluation, with -before and -ema behind it)",
    )
    parser.add_argument(
        "--answer-tokens",
        type=positive_int,
        default=None,
        help="longest answer in tokens (default: 16, or the benchmark's)",
    )
    parser.add_argument(
        "--losses", action="store_true", help="instead of asking, write each sample's loss and length to losses.jsonl"
    )
    add_sampling_arguments(parser, seed="0")
    add_launch_arguments(parser)
    parser.set_defaults(
        run=_evaluate,
        kept=lambda options: "losses are not kept" if options.losses else "the answers given so far are kept",
    )


def _evaluate(options: argparse.Namespace) -> None:
    from megatron_eagle.config.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)  # before PyTorch: a typo is answered at once
    stage = recipe.stage(options.stage) if options.stage else recipe.stages[-1]
    for name in ("limit", "blank", "judge"):
        if options.benchmarks is None and getattr(options, name):
            raise UserError(f"--{name} is for --benchmarks; a data set is asked whole, with and without its images")
    if options.losses and options.benchmarks is not None:
        raise UserError("--losses is of a data set's samples; benchmarks have none")
    drawn = sampling_of(options)
    if options.losses and options.temperature:
        raise UserError("--losses asks nothing, --temperature is for answers")
    requests = _requests(options)
    become_part_of_a_run(options.processes)
    platform = open_platform(options)
    with importing():
        from megatron_eagle.training.run_folder import RunFolder  # and Megatron with it

    run_folder = RunFolder(options.runs / recipe.name)
    asked: dict[str, bool] = {"before": options.before, "ema": options.ema}
    out = options.out or run_folder.path / "-".join(["evaluation", *(name for name in asked if asked[name])])
    if options.losses:
        from megatron_eagle.evaluation.losses import measure_losses

        measure_losses(recipe, stage, run_folder, options.data, out, platform, **asked)
    elif requests is None:
        from megatron_eagle.evaluation.sampling import Sampling
        from megatron_eagle.evaluation.score import evaluate

        most = options.answer_tokens or ANSWER_TOKENS
        sampling = Sampling(**drawn)
        evaluate(recipe, stage, run_folder, options.data, out, platform, most, sampling, **asked)
    else:
        from megatron_eagle.evaluation.benchmarks.run import Wishes, evaluate_benchmarks
        from megatron_eagle.evaluation.sampling import Sampling

        wishes = Wishes(options.limit, options.answer_tokens, options.blank, _judge(options), Sampling(**drawn))
        evaluate_benchmarks(recipe, stage, run_folder, requests, out, platform, wishes, **asked)
    if options.trace_platform:
        print_once(platform.report())


def _requests(options: argparse.Namespace) -> "list[Request] | None":
    if options.benchmarks is None:
        return None
    from megatron_eagle.evaluation.benchmarks.locate import parse_requests

    return parse_requests(options.benchmarks, options.data)


def _judge(options: argparse.Namespace) -> "Endpoint | None":
    if options.judge is None:
        return None
    from megatron_eagle.endpoint.client import check_installed
    from megatron_eagle.endpoint.settings import Endpoint

    check_installed()
    url, model = options.judge
    try:
        return Endpoint(url, model, key_file=options.judge_key)
    except ValueError as error:
        raise UserError(f"--judge {url} {model}: {error}") from None
