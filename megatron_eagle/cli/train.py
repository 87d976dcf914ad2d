"""``megatron-eagle train``: one stage of a recipe."""

import argparse

from megatron_eagle.cli.common import (
    Verbs,
    add_launch_arguments,
    add_recipe_arguments,
    become_part_of_a_run,
    open_platform,
    print_once,
    verb,
)


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "train",
        "train one stage of a recipe",
        "Trains a stage to its last step, starting from the stage before it. Given again after any interruption, the\n"
        "same command continues from the newest checkpoint; given after the last step, it does nothing.",
        "  megatron-eagle train examples/tiny/recipe.yaml --stage stage1 --processes 2\n"
        "  torchrun --nproc-per-node 8 -m megatron_eagle train examples/eagle2-1b/recipe.yaml --stage stage1.5\n",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--stage", required=True, help="name of the stage, e.g. stage1.5")
    add_launch_arguments(parser)
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    platform = open_platform(options)
    from megatron_eagle.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    recipe.stage(options.stage)
    become_part_of_a_run(options.processes)
    from megatron_eagle.training.loop import RunFolder, train_stage

    train_stage(recipe, options.stage, RunFolder(options.runs / recipe.name), platform)
    if options.trace_platform:
        print_once(platform.report())
