"""``megatron-eagle train``: one stage of a recipe."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eagle.cli.common import (
    Verbs,
    add_launch_arguments,
    add_recipe_arguments,
    become_part_of_a_run,
    not_negative,
    open_platform,
    positive_int,
    print_once,
    seconds,
    verb,
)
from megatron_eagle.cli.interrupts import to_continue
from megatron_eagle.errors import Superseded
from megatron_eagle.importing import importing

if TYPE_CHECKING:
    from megatron_eagle.config.recipe import Recipe
    from megatron_eagle.training.watchdog import Watchdog


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "train",
        "train one stage of a recipe",
        "Trains a stage to its last step, starting from the stage before it. Given again after any interruption, the\n"
        "same command continues from the newest checkpoint; given after the last step, it does nothing.\n"
        "Ctrl-C or SIGTERM ends the step, saves it, says how to continue and exits with 85; a second Ctrl-C aborts.",
        "  megatron-eagle train tiny --stage stage1 --processes 2\n"
        "  torchrun --nproc-per-node 8 -m megatron_eagle train eagle2-1b --stage stage1.5\n",
        progress=True,
        details="say all numbers of a step: learning rate, padding, tiles, operations, MFU, data wait",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--stage", required=True, help="name of the stage, e.g. stage1.5")
    add_launch_arguments(parser)
    parser.add_argument(
        "--stacks", type=Path, metavar="FOLDER", help="under a scheduler: end when hanging, and write all stacks there"
    )
    parser.add_argument(
        "--hang",
        type=_hang,
        default=(20.0, 300.0, 1800.0, 10.0),
        metavar="F,A,O,G",
        help="a hang is no step for F times the median step, at least A seconds; O seconds for all else; G of grace",
    )
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="if the newest checkpoint is damaged, continue from the newest that is not; without it that is an error",
    )
    parser.add_argument(
        "--start",
        type=positive_int,
        metavar="N",
        help="under a scheduler: number of this start of the run, as 'megatron-eagle job begin' has said",
    )
    parser.set_defaults(run=_train, kept=lambda options: "what was saved before is kept")


def _train(options: argparse.Namespace) -> None:
    from megatron_eagle.config.recipe import load_recipe

    # Before PyTorch, whose import takes seconds in which a signal may come.
    watch = _open_watch(options) if "RANK" in os.environ else None
    recipe = load_recipe(options.recipe, options.overrides)  # also before it: a typo is answered at once
    recipe.stage(options.stage)
    become_part_of_a_run(options.processes, saves=True)
    watch = watch or _open_watch(options)
    platform = open_platform(options)
    with importing():
        from megatron_eagle.training.loop import train_stage
        from megatron_eagle.training.non_finite import NonFinite
        from megatron_eagle.training.run_folder import RunFolder
        from megatron_eagle.training.watchdog import (
            NON_FINITE_EXIT_CODE,
            STOPPED_EXIT_CODE,
            SUPERSEDED_EXIT_CODE,
            StoppedEarly,
        )

    if platform.device.type == "cuda" and os.environ["RANK"] == "0":
        _warn_of_memory(recipe, options.stage)
    run_folder = RunFolder(options.runs / recipe.name)
    settings = {"fallback": options.fallback, "start": options.start}
    if recipe.stage(options.stage).evaluation:
        from megatron_eagle.evaluation.while_training import make_evaluator

        settings["make_evaluator"] = make_evaluator
    try:
        train_stage(recipe, options.stage, run_folder, platform, watch, **settings)
    except Superseded as superseded:
        print_once(f"megatron-eagle: {superseded}: leaving")
        sys.exit(SUPERSEDED_EXIT_CODE)
    except StoppedEarly as stopped:
        way_on = "" if options.stacks else f" in {run_folder.stage_checkpoints(options.stage)}; {to_continue()}"
        print_once(f"megatron-eagle: {stopped}{way_on}")
        sys.exit(STOPPED_EXIT_CODE)
    except NonFinite as found:
        print_once(f"megatron-eagle: {found}")
        sys.exit(NON_FINITE_EXIT_CODE)
    finally:
        watch.close()
    if options.trace_platform:
        print_once(platform.report())


def _warn_of_memory(recipe: "Recipe", stage: str) -> None:
    """Say that the stage does not fit by the plan, of this GPU's memory; it may be wrong, so that is no refusal."""
    from dataclasses import replace

    import torch

    from megatron_eagle.planning.hardware import load_hardware
    from megatron_eagle.planning.report import too_large

    own = torch.cuda.get_device_properties(torch.cuda.current_device())
    hardware = replace(load_hardware("h100"), name=own.name, memory_bytes=float(own.total_memory))
    if said := too_large(recipe, recipe.stage(stage), int(os.environ["WORLD_SIZE"]), hardware):
        print(f"megatron-eagle: warning: {said}", file=sys.stderr, flush=True)


def _hang(text: str) -> tuple[float, ...]:
    """F,A,O,G."""
    parts = text.split(",")
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(f"four numbers F,A,O,G are wanted (got {text!r})")
    return (*map(seconds, parts[:3]), not_negative(parts[3]))


def _open_watch(options: argparse.Namespace) -> "Watchdog":
    """What a scheduler or a person may ask of this process: a stop after the current step (USR1, TERM, Ctrl-C), and an
    end if it hangs.

    A stop before the first step is an end at once, also amid imports.
    """
    from megatron_eagle.training.watchdog import HangLimits, Watchdog

    rank = int(os.environ["RANK"])
    if options.stacks is None:
        watch = Watchdog(rank=rank, way_on=to_continue())
    else:
        watch = Watchdog(HangLimits(*options.hang), options.stacks, rank=rank)
    watch.leave_on(signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    return watch
