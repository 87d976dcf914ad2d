"""``megatron-eagle evaluate``: answer the questions of a data set and score them."""

import argparse
from pathlib import Path

from megatron_eagle.cli.common import (
    Verbs,
    add_launch_arguments,
    add_recipe_arguments,
    become_part_of_a_run,
    open_platform,
    positive_int,
    print_once,
    verb,
)


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "evaluate",
        "answer the questions of a data set and score them",
        "Answers every question greedily, once with its images and once with them blanked, and counts exact matches\n"
        "per task. Writes predictions.jsonl and accuracy.json.",
        "  megatron-eagle evaluate tiny --data runs/demo/data/heldout --processes 2\n",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="data set folder made by 'data build'")
    parser.add_argument(
        "--stage", default=None, help="stage whose newest checkpoint is used (default: the recipe's last)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the results (default: <runs>/<name>/evaluation)"
    )
    parser.add_argument("--answer-tokens", type=positive_int, default=16, help="longest answer in tokens (default: 16)")
    parser.add_argument(
        "--losses", action="store_true", help="instead of asking, write each sample's loss and length to losses.jsonl"
    )
    add_launch_arguments(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from megatron_eagle.config.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)  # before PyTorch: a typo is answered at once
    stage = recipe.stage(options.stage) if options.stage else recipe.stages[-1]
    platform = open_platform(options)
    become_part_of_a_run(options.processes)
    from megatron_eagle.evaluation.losses import measure_losses
    from megatron_eagle.evaluation.score import evaluate
    from megatron_eagle.training.run_folder import RunFolder

    run_folder = RunFolder(options.runs / recipe.name)
    out = options.out or run_folder.path / "evaluation"
    if options.losses:
        measure_losses(recipe, stage, run_folder, options.data, out, platform)
    else:
        evaluate(recipe, stage, run_folder, options.data, out, platform, options.answer_tokens)
    if options.trace_platform:
        print_once(platform.report())
