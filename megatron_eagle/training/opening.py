"""How a stage begins: from what lies in the run's folder to a model, an optimizer and a stream in their places.

Its own newest checkpoint, if there is one, else the weights of the stage before or of the recipe. Every process calls
these functions at the same place; what fails on one of them is everybody's (``parallel.agreement``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_eagle.checkpoint.files import (
    POSITION_FILE,
    Description,
    find_good,
    find_latest,
    load_training_state,
    load_weights,
    own_file,
    read_description,
)
from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.lora import LoraSettings
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.stream.streams import Stream, open_stage_stream
from megatron_eagle.errors import UserError
from megatron_eagle.parallel.agreement import on_rank_zero, refuse_together
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.training.adapters import base_checkpoint, load_base, require_fitting
from megatron_eagle.training.engine import Engine, build_engine
from megatron_eagle.training.resume_rules import changes
from megatron_eagle.training.run_folder import RunFolder
from megatron_eagle.training.start_up import Reached
from megatron_eagle.training.throughput import stated_peak


@dataclass(frozen=True)
class OwnCheckpoint:
    """A checkpoint of the stage itself, from which it continues."""

    path: Path
    description: Description


@dataclass(frozen=True)
class Opened:
    """A stage ready for its next step.

    stream: on the processes that read. weights: the checkpoint they came from, None if they were drawn. base: digest of
    what adapters belong to.
    """

    engine: Engine
    stream: Stream | None
    weights: Path | None
    base: str | None


def newest(stage_folder: Path, *, fallback: bool, say: Callable[[str], None]) -> OwnCheckpoint | None:
    """The checkpoint to continue from; one process's work. fallback: pass over damaged ones, and say which."""
    found, damaged = find_good(stage_folder) if fallback else (find_latest(stage_folder), [])
    for line in damaged:
        say(f"passed over: {line}")
    return OwnCheckpoint(found, read_description(found)) if found else None


def open_stage(
    recipe: Recipe,
    stage: Stage,
    run_folder: RunFolder,
    own: OwnCheckpoint | None,
    platform: Platform,
    groups: Groups,
    reached: Reached,
) -> Opened:
    """Build the stage, load what it starts or goes on from, open its data there; UserError if something is wrong.

    reached: told when ``model``, ``weights`` and ``data`` are there.
    """
    before = None if own else on_rank_zero(lambda: run_folder.weights_before(recipe, stage))
    weights = own.path if own else before
    engine = build_engine(recipe, stage, platform, groups)
    reached("model")
    base = _load_base(recipe, recipe.lora, engine, weights) if recipe.lora else None
    position = None
    if own:
        position = load_training_state(own.path, own.description, engine.state(), groups)
    elif weights:
        load_weights(weights, engine.state().modules, "adapters" if recipe.lora else "base")
        engine.reload_optimizer()
    reached("weights")
    stream = _open_stream(recipe, stage, own, position, groups)
    reached("data")
    return Opened(engine, stream, weights, base)


def opening_line(
    recipe: Recipe, stage: Stage, opened: Opened, *, step: int, groups: Groups, device: torch.device
) -> str:
    """What a stage is about to do, on one line. step: those that it has already."""
    layout, engine = recipe.stage_layout(stage), opened.engine
    origin, what = str(opened.weights or "random weights"), ", ".join(stage.trainable)
    if stage.freeze:
        what = f"{what} without {', '.join(stage.freeze)}"
    if recipe.lora:
        drawn = recipe.model.initial_weights or "random weights"
        origin, what = f"{opened.weights or 'new adapters'} on {drawn} ({opened.base})", f"adapters of {what}"
    peak = stated_peak(device)
    return (
        f"{stage.name}: steps {step + 1} to {stage.steps} from {origin}; trains {what} "
        f"({engine.trainable_parameters:,} parameters); {stage.batch} packs of {stage.pack_length} tokens a step; "
        f"tp={layout.tp} pp={layout.pp} cp={layout.cp} dp={groups.dp_size} encoder={layout.encoder} "
        f"on {device.type}{f', MFU of {peak / 1e12:.0f} TFLOP/s' if peak else ''}"
    )


def _load_base(recipe: Recipe, lora: LoraSettings, engine: Engine, adapters: Path | None) -> str:
    """What adapters belong to, before they are loaded from a checkpoint, if there is one; its digest."""
    copy = engine.encoder.copy if engine.encoder else None
    base = load_base(on_rank_zero(lambda: base_checkpoint(recipe)), engine.models, copy)
    engine.pack_base()
    if adapters:
        on_rank_zero(lambda: require_fitting(adapters, lora, base))
    return base


def _open_stream(
    recipe: Recipe, stage: Stage, own: OwnCheckpoint | None, position: bytes | None, groups: Groups
) -> Stream | None:
    """The reader's stream of packs."""
    stream, message, where = None, None, ""
    if groups.is_reader:
        try:
            stream = open_stage_stream(recipe, stage, groups.dp_rank, groups.dp_size)
            if own is not None and position is not None:
                where = f"{own_file(own.path, POSITION_FILE, groups.dp_rank)}: "
                stream.restore(position)
        except UserError as error:
            found = changes(own.description, recipe, stage) if where and own else []
            message = f"{where}{error}" + (f"; the recipe's changes: {', '.join(found)}" if found else "")
    refuse_together(message)
    return stream
