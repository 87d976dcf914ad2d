"""``megatron-eagle plan``: memory, time and balance of a recipe, before it runs."""

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_eagle.cli.common import Verbs, verb


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "plan",
        "say what a recipe needs on a number of GPUs, before it runs",
        "Counts the bytes of every process and the operations of every pack, simulates the pipeline, and says whether\n"
        "each stage fits and how long it takes. --search looks for the best layouts instead; --dry-run builds every\n"
        "distinct process without memory and checks that all of them would issue the same exchanges. No GPU is needed.",
        "  megatron-eagle plan examples/eagle2-9b/recipe.yaml --gpus 256 --gpu h100\n"
        "  megatron-eagle plan examples/eagle2-9b/recipe.yaml --gpus 1024 --stage stage1.5 --search\n",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values to change, e.g. layout.tp=2")
    parser.add_argument("--gpus", type=int, default=None, help="number of GPUs (default: what each stage names)")
    parser.add_argument("--gpu", default="h100", help="hardware profile, or a YAML file of one (default: h100)")
    parser.add_argument("--stage", default=None, help="plan this stage only")
    parser.add_argument(
        "--tokens-per-sample", type=float, default=2000.0, help="mean length of samples (default: 2000)"
    )
    parser.add_argument("--visual", type=float, default=0.8, help="share of a sample's tokens that are tiles (0.8)")
    parser.add_argument("--batch", type=int, default=None, help="packs in a step, instead of the recipe's")
    parser.add_argument("--pack-length", type=int, default=None, help="tokens of a pack, instead of the recipe's")
    parser.add_argument("--ranks", action="store_true", help="also list the memory of every pipeline stage")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--search", action="store_true", help="find the ten best layouts")
    mode.add_argument("--dry-run", action="store_true", help="build every distinct process and check its exchanges")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from megatron_eagle.platform import install

    install()
    from megatron_eagle.errors import UserError
    from megatron_eagle.planning.hardware import load_hardware
    from megatron_eagle.planning.plan import plan_stage
    from megatron_eagle.planning.report import assumptions, memory_table, search_table, stage_table, time_line
    from megatron_eagle.planning.samples import Mix
    from megatron_eagle.planning.search import search
    from megatron_eagle.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    changes = {"batch": options.batch, "pack_length": options.pack_length}
    changed = {name: value for name, value in changes.items() if value is not None}
    recipe = replace(recipe, stages=tuple(replace(stage, **changed) for stage in recipe.stages))
    stages = [recipe.stage(options.stage)] if options.stage else list(recipe.stages)
    for stage in stages:
        if not (options.gpus or stage.gpus):
            raise UserError(f"stage '{stage.name}' names no number of GPUs: give --gpus")
    if options.dry_run:
        from megatron_eagle.planning.dry_run import dry_run

        for stage in stages:
            print(dry_run(recipe, stage, options.gpus or stage.gpus or 0).text(), flush=True)
        return
    hardware, mix = load_hardware(options.gpu), Mix(options.tokens_per_sample, options.visual)
    print(assumptions(hardware, mix) + "\n")
    if options.search:
        for stage in stages:
            gpus = options.gpus or stage.gpus or 0
            table = search_table(search(recipe, stage, gpus, hardware, mix))
            print(f"{stage.name} on {gpus} {hardware.name}\n\n{table}\n")
        return
    plans = [plan_stage(recipe, stage, options.gpus or stage.gpus or 0, hardware, mix) for stage in stages]
    print(stage_table(plans))
    for plan in plans:
        print(f"\n{plan.stage.name} on {plan.gpus} GPUs: {time_line(plan)}")
        if options.ranks:
            print("\n" + memory_table(plan))
