"""``megatron-eagle recipe``: check one and print it in full."""

import argparse

from megatron_eagle.cli.common import Verbs, add_recipe_arguments, verb


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "recipe",
        "check a recipe and print it with every default filled in",
        "Reads the recipe as 'train' would, refuses what cannot work, and prints all of it as YAML.",
        "  megatron-eagle recipe eagle2-9b layout.tp=4\n",
    )
    add_recipe_arguments(parser)
    parser.set_defaults(run=_recipe)


def _recipe(options: argparse.Namespace) -> None:
    from megatron_eagle.config.recipe import load_recipe, recipe_as_yaml

    print(recipe_as_yaml(load_recipe(options.recipe, options.overrides)), end="")
