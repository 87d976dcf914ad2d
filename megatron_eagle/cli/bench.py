"""``megatron-eagle bench``: some steps of a recipe on synthetic packs, against the plan."""

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_eagle.cli.common import (
    Verbs,
    add_launch_arguments,
    add_recipe_arguments,
    become_part_of_a_run,
    open_platform,
    verb,
)


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "bench",
        "measure some steps of a recipe and write a dated report beside the plan",
        "Trains on synthetic packs, without data or checkpoints, and writes Markdown and JSON.",
        "  megatron-eagle bench examples/tiny/recipe.yaml --stage stage1.5 --processes 2 --gpu cpu\n",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--stage", required=True, help="name of the stage, e.g. stage1.5")
    parser.add_argument("--steps", type=int, default=5, help="steps to measure, after one to warm up (default: 5)")
    parser.add_argument("--gpu", default="h100", help="hardware profile to predict with (default: h100)")
    parser.add_argument("--batch", type=int, default=None, help="packs in a step, instead of the recipe's")
    parser.add_argument(
        "--tokens-per-sample", type=float, default=2000.0, help="mean length of samples (default: 2000)"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/reports"), help="folder of the report")
    parser.add_argument("--compare", type=Path, default=None, help="JSON of an earlier report to set beside")
    add_launch_arguments(parser)
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> None:
    platform = open_platform(options)
    from megatron_eagle.planning.hardware import load_hardware
    from megatron_eagle.planning.samples import Mix
    from megatron_eagle.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    stage = recipe.stage(options.stage)
    if options.batch:
        recipe = replace(recipe, stages=(replace(stage, batch=options.batch),))
        stage = recipe.stages[0]
    hardware = load_hardware(options.gpu)
    become_part_of_a_run(options.processes)
    from megatron_eagle.planning.bench import run_bench, write_report

    measured = run_bench(recipe, stage, platform, hardware, Mix(options.tokens_per_sample), options.steps)
    if measured is not None:
        path = write_report(measured, options.out, options.compare)
        print(path.read_text() + f"\n{path}", flush=True)
