"""``megatron-eagle recipe``: check one and print it in full, or explain its keys."""

import argparse
import json

from megatron_eagle.cli.common import Verbs, add_recipe_arguments, verb
from megatron_eagle.errors import UserError


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "recipe",
        "check a recipe and print it with every default filled in",
        "Reads the recipe as 'train' would, refuses what cannot work, and prints all of it as YAML, each key with\n"
        "what it does. docs/recipe.md has all keys on one page.",
        "  megatron-eagle recipe eagle2-9b layout.tp=4\n"
        "  megatron-eagle recipe --explain reading.packing\n"
        "  megatron-eagle recipe eagle2-9b --explain stages\n",
    )
    add_recipe_arguments(parser, needed=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--explain", metavar="KEY", help="what a key does and may be, and its value in RECIPE")
    what.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for editors")
    parser.set_defaults(run=_recipe)


def _recipe(options: argparse.Namespace) -> None:
    from megatron_eagle.config.explained import commented_yaml, explain, json_schema
    from megatron_eagle.config.recipe import load_recipe, recipe_as_data

    if options.schema:
        print(json.dumps(json_schema(), indent=1))
        return
    recipe = recipe_as_data(load_recipe(options.recipe, options.overrides)) if options.recipe else None
    if options.explain:
        print(explain(options.explain, recipe))
    elif recipe is None:
        raise UserError("recipe: RECIPE is needed, or --explain KEY, or --schema (see --help)")
    else:
        print(commented_yaml(recipe), end="")
