"""``megatron-eagle plan``: memory, time and balance of a recipe, before it runs."""

import argparse
from pathlib import Path

from megatron_eagle.cli.common import Verbs, fraction, positive_int, tokens, verb


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "plan",
        "say what a recipe needs on a number of GPUs, before it runs",
        "Counts the bytes of every process and the operations of every pack, simulates the pipeline, and says whether\n"
        "each stage fits and how long it takes. Packs are those of the stage's own data sets where they are on this\n"
        "machine, else made up. --search looks for the best layouts instead; --dry-run takes every distinct process\n"
        "through a step without memory and checks that all processes meet in every exchange. No GPU is needed.\n"
        "Ends with 2 if a stage does not fit, and names the nearest layout that does.",
        "  megatron-eagle plan eagle2-9b --gpus 256 --gpu h100\n"
        "  megatron-eagle plan eagle2-9b --gpus 1024 --stage stage1.5 --search --html plan.html\n",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file, or the name of one that comes along")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values to change, e.g. layout.tp=2")
    parser.add_argument(
        "--gpus", type=positive_int, default=None, help="number of GPUs (default: what each stage names)"
    )
    parser.add_argument("--gpu", default="h100", help="hardware profile, or a YAML file of one (default: h100)")
    parser.add_argument("--stage", default=None, help="plan this stage only")
    parser.add_argument(
        "--tokens-per-sample", type=tokens, default=None, help="mean length of made-up samples (default: 2000)"
    )
    parser.add_argument("--visual", type=fraction, default=None, help="share of their tokens that are tiles (0.8)")
    parser.add_argument("--batch", type=positive_int, default=None, help="packs in a step, instead of the recipe's")
    parser.add_argument(
        "--pack-length", type=positive_int, default=None, help="tokens of a pack, instead of the recipe's"
    )
    parser.add_argument("--ranks", action="store_true", help="also list the memory of every pipeline stage")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--search", action="store_true", help="find the ten best layouts")
    mode.add_argument(
        "--dry-run", action="store_true", help="walk every distinct process through a step and let all meet"
    )
    parser.add_argument(
        "--html", type=Path, default=None, metavar="OUT.html", help="also write a page: memory, schedule, layouts"
    )
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from megatron_eagle.config.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)  # before PyTorch: a typo is answered at once
    from megatron_eagle.compat.platform import install

    install()
    from megatron_eagle.data.sample.tokenizer import check_if_there
    from megatron_eagle.errors import UserError
    from megatron_eagle.planning.hardware import load_hardware
    from megatron_eagle.planning.page import write_page
    from megatron_eagle.planning.plan import plan_stage
    from megatron_eagle.planning.reading import reading_line
    from megatron_eagle.planning.report import (
        assumptions,
        memory_table,
        refusal,
        search_table,
        stage_line,
        stage_table,
        time_line,
    )
    from megatron_eagle.planning.samples import Mix, samples_of
    from megatron_eagle.planning.search import nearest, search
    from megatron_eagle.text import folded

    names = [recipe.stage(options.stage).name] if options.stage else [stage.name for stage in recipe.stages]
    for name in names:
        recipe = recipe.with_stage(name, batch=options.batch, pack_length=options.pack_length)
    check_if_there(recipe)
    stages = [recipe.stage(name) for name in names]
    for stage in stages:
        if not (options.gpus or stage.gpus):
            raise UserError(f"stage '{stage.name}' names no number of GPUs: give --gpus")
    if options.dry_run:
        if options.html:
            raise UserError("--html shows a plan or a search, a --dry-run makes neither")
        from megatron_eagle.dry_run.walk import dry_run

        for stage in stages:
            outcome = dry_run(recipe, stage, options.gpus or stage.gpus or 0)
            print(outcome.text(), flush=True)
            if not outcome.equal:
                raise UserError(f"stage '{stage.name}': bytes as built differ from the plan, see above")
        return
    hardware = load_hardware(options.gpu)
    given = {"tokens_per_sample": options.tokens_per_sample, "visual": options.visual}
    mix = Mix(packing=recipe.reading.packing, **{name: value for name, value in given.items() if value is not None})
    asked_for_made_up = any(value is not None for value in given.values())
    samples = {stage.name: mix if asked_for_made_up else samples_of(recipe, stage, mix) for stage in stages}
    fp8 = recipe.fp8 is not None
    print(folded(assumptions(hardware, fp8=fp8)))
    for stage in stages:
        print(folded(f"{stage.name}: {samples[stage.name].describe()}"))
    if options.search:
        layouts, without = [], []
        for stage in stages:
            gpus = options.gpus or stage.gpus or 0
            layouts.append(search(recipe, stage, gpus, hardware, samples[stage.name]))
            where = f"{stage.name} on {gpus} {hardware.name}"
            print(f"\n{where}\n\n{search_table(layouts[-1])}")
            if not layouts[-1]:
                without.append(f"{where}: no layout fits")
        if options.html:
            shown = [(found[0], found) for found in layouts if found]
            write_page(recipe.name, hardware, shown, options.html, fp8=fp8, without=without)
            print(f"\n{options.html}")
        if without:
            raise UserError("; ".join(without))
        return
    plans = [
        plan_stage(recipe, stage, options.gpus or stage.gpus or 0, hardware, samples[stage.name]) for stage in stages
    ]
    print("\n" + stage_table(plans))
    for plan in plans:
        print("\n" + folded(f"{plan.stage.name} on {plan.gpus} GPUs: {time_line(plan)}"))
        if plan.layout.pp > 1:
            print(folded(stage_line(plan)))
        print(folded(reading_line(plan, recipe.reading)))
        if options.ranks:
            print("\n" + memory_table(plan))
    if options.html:
        write_page(recipe.name, hardware, [(plan, ()) for plan in plans], options.html, fp8=fp8)
        print(f"\n{options.html}")
    refused = [
        refusal(plan, nearest(recipe, plan.stage, plan.gpus, hardware, samples[plan.stage.name]))
        for plan in plans
        if not plan.fits
    ]
    if refused:
        raise UserError("; ".join(refused))
