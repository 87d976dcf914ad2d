"""``megatron-eagle bench``: some steps of a recipe, against the plan; or the rates of this machine, for the planner."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eagle.cli.common import (
    Verbs,
    add_launch_arguments,
    add_recipe_arguments,
    become_part_of_a_run,
    open_platform,
    positive_int,
    tokens,
    verb,
)

if TYPE_CHECKING:
    from megatron_eagle.config.recipe import Recipe


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "bench",
        "measure some steps of a recipe and write a dated report beside the plan",
        "Trains some steps without a checkpoint, on synthetic packs or the stage's own, and writes Markdown, JSON,\n"
        "PNG and a page into the run's folder: time by phase, memory and utilisation beside what the plan says of\n"
        "the same packs. --calibrate measures this machine instead and writes a hardware profile for `plan --gpu`\n"
        "and `bench --gpu`.",
        "  megatron-eagle bench tiny --stage stage1.5 --processes 2 --calibrate my_cpu.yaml\n"
        "  megatron-eagle bench tiny --stage stage1.5 --processes 2 --gpu my_cpu.yaml\n",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--stage", required=True, help="name of the stage, e.g. stage1.5")
    parser.add_argument(
        "--steps", type=positive_int, default=5, help="steps to measure, after one to warm up (default: 5)"
    )
    parser.add_argument(
        "--gpu", default=None, help="hardware profile, or a YAML file of one (default: h100, on a CPU cpu)"
    )
    parser.add_argument("--batch", type=positive_int, default=None, help="packs in a step, instead of the recipe's")
    parser.add_argument(
        "--layers",
        type=positive_int,
        default=None,
        help="decoder layers, instead of the model's, evenly over the stages",
    )
    parser.add_argument("--packs", choices=("synthetic", "data"), default="synthetic", help="default: synthetic")
    parser.add_argument(
        "--tokens-per-sample", type=tokens, default=2000.0, help="mean length of synthetic samples (default: 2000)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the report (default: bench in the run's folder, see --runs)"
    )
    parser.add_argument("--compare", type=Path, default=None, help="JSON of an earlier report to set beside")
    parser.add_argument("--profile", action="store_true", help="also write a torch profiler trace of one more step")
    parser.add_argument("--calibrate", type=Path, default=None, metavar="OUT.yaml", help="measure this machine instead")
    add_launch_arguments(parser)
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> None:
    from megatron_eagle.config.recipe import load_recipe

    recipe, reduced = _reduced(load_recipe(options.recipe, options.overrides), options)  # a typo needs no PyTorch
    if options.compare:
        from megatron_eagle.measuring.bench_report import read_measurement

        read_measurement(options.compare)  # refused now rather than after the measurement
    become_part_of_a_run(options.processes)
    platform = open_platform(options)
    from megatron_eagle.planning.hardware import hardware_as_yaml, load_hardware
    from megatron_eagle.planning.samples import Mix

    stage = recipe.stage(options.stage)
    hardware = load_hardware(options.gpu or ("cpu" if platform.device.type == "cpu" else "h100"))
    out = options.out or options.runs / recipe.name / "bench"
    if options.calibrate:
        from megatron_eagle.measuring.calibrate import calibrate

        found = calibrate(recipe, stage, platform, hardware)
        if found is not None:
            options.calibrate.write_text(hardware_as_yaml(found), encoding="utf-8")
            print(f"{options.calibrate}: {found.sources['products']}", flush=True)
        return
    from megatron_eagle.measuring.bench import run_bench
    from megatron_eagle.measuring.bench_report import report_name, write_report

    samples = Mix(options.tokens_per_sample, packing=recipe.reading.packing) if options.packs == "synthetic" else None
    trace = out / "trace.json.gz" if options.profile else None
    measured = run_bench(recipe, stage, platform, hardware, samples, options.steps, trace=trace, reduced=reduced)
    if measured is not None:
        path = write_report(measured, out, options.compare)
        print(f"{path.read_text(encoding='utf-8')}\n{path}\n{path.with_suffix('.html')}", flush=True)
        if trace:
            print(trace.rename(out / f"{report_name(measured)}-trace.json.gz"), flush=True)


def _reduced(recipe: "Recipe", options: argparse.Namespace) -> tuple["Recipe", list[str]]:
    """The recipe with the stage and model that were asked for, and what differs from it."""
    from megatron_eagle.config.findings import refusing

    stage, reduced = recipe.stage(options.stage), []
    if options.batch and options.batch != stage.batch:
        reduced.append(f"{options.batch} packs a step instead of {stage.batch}")
        stage = recipe.with_stage(stage.name, batch=options.batch).stage(stage.name)
    model = recipe.model
    if options.layers:
        reduced.append(f"{options.layers} decoder layers instead of {model.eagle().language.num_hidden_layers}")
        model = replace(model, language={**model.language, "num_hidden_layers": options.layers})
        stage = replace(stage, layout=replace(recipe.stage_layout(stage), layers_per_stage=None))
    # Data are drawn by the seed and the number of the stage, which is the first now.
    seed = recipe.data_seed(recipe.stage(options.stage))
    with refusing(type(recipe)):
        return replace(recipe, model=model, stages=(stage,), layout=recipe.stage_layout(stage), seed=seed), reduced
