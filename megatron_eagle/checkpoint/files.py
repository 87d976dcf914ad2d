"""Training checkpoints: what they are, which one to continue from, and loading them (``saver.py`` writes them).

    runs/<name>/checkpoints/<stage>/
        step_00000250/            weights, optimizer, schedule (torch_dist), position in the data and RNG per process
            checkpoint.json       what it is: stage, step, model, layout, recipe; read before any tensor
            tokenizer/            the files of the recipe's tokenizer, so that the weights are never without theirs
            checksums.json        size and CRC-32 of every file; held against the files before they are loaded
        latest                    name of the newest whole checkpoint; moved last

Any layout and either placement of the encoders loads what any other has saved. A planned stream continues at any
number of data-parallel ranks; a stream with ``reading.order: buffer`` refuses another number than it was saved by.
"""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.transformer.module import MegatronModule
from pydantic import TypeAdapter
from torch.distributed.checkpoint.api import CheckpointException

from megatron_eagle import __version__
from megatron_eagle.checkpoint import checksums, safe_index
from megatron_eagle.checkpoint.sharded_state import (
    EMA,
    TrainingState,
    Which,
    averaged_weights,
    load_modules,
    load_state,
    optimizer_parts,
    restore_random_state,
    sharded_state,
    sharded_weights,
)
from megatron_eagle.config.encoders import encoder_config
from megatron_eagle.config.model import EagleConfig
from megatron_eagle.errors import Damaged, UserError
from megatron_eagle.parallel.groups import Groups

LATEST = "latest"
DESCRIPTION = "checkpoint.json"
TOKENIZER = "tokenizer"
PROCESS_FILE = "process_{:05d}.pt"  # random states, one a process
POSITION_FILE = "position_{:05d}.pt"  # place in the data, one a data-parallel rank


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds: its place in the run, and the model it belongs to (``EagleConfig`` as a dict).

    rejected_total: samples skipped in the stage up to this step.
    peak_rss_bytes: highest resident memory of each process so far, added up over all of them.
    recipe: values of the recipe it was trained with, by dotted key; none in checkpoints written before 2026-11-26.
    best_score, waited, best_by: highest score of the stage's evaluations, if there were any, how many have come since,
        and which score it is, in words.
    base, lora: of one that holds LoRA's adapters alone, the digest of the weights that they belong to, and their
        numbers (``LoraSettings`` as a dict).
    """

    stage: str
    step: int
    steps: int
    model: dict[str, Any]
    layout: dict[str, Any]
    data_parallel_size: int
    trainable_parameters: int = 0
    rejected_total: int = 0
    peak_rss_bytes: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)
    best_score: float | None = None
    waited: int = 0
    best_by: str | None = None
    base: str | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    version: str = __version__

    @property
    def complete(self) -> bool:
        """Whether the stage had reached its last step."""
        return self.step >= self.steps


def find_latest(stage_folder: Path) -> Path | None:
    """The newest whole checkpoint below ``stage_folder``, or None; UserError if ``latest`` names something else."""
    file = stage_folder / LATEST
    try:
        name = file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not re.fullmatch(r"step_\d+", name):
        raise UserError(f"{file} names {name[:60]!r}, which is no checkpoint of this stage")
    return stage_folder / name


def find_good(stage_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what was written and say what it is; what is wrong with each newer one.

    Reads whole checkpoints; for one process, which tells the others, because all must continue from the same.
    """
    damaged = []
    for candidate in sorted(stage_folder.glob("step_*[0-9]"), reverse=True):
        if found := checksums.damage(candidate):
            damaged.append(f"{candidate} is damaged: {'; '.join(found)}")
            continue
        try:
            read_description(candidate)  # which checksums cannot vouch for where there are none
        except Damaged as error:
            damaged.append(str(error))
            continue
        return candidate, damaged
    return None, damaged


def read_description(checkpoint: Path) -> Description:
    """Read what ``checkpoint`` is; Damaged if it is not a checkpoint of this project."""
    try:
        return Description(**json.loads((checkpoint / DESCRIPTION).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        what = f"{checkpoint} is not a checkpoint of megatron-eagle: its {DESCRIPTION}: {error}"
        raise Damaged(what, folder=str(checkpoint)) from None


def model_of(checkpoint: Path, description: Description) -> EagleConfig:
    """The model that ``checkpoint`` belongs to; UserError if it is none of this project."""
    try:
        return TypeAdapter(EagleConfig).validate_python(description.model)
    except ValueError as error:
        raise UserError(f"{checkpoint} holds a model of other kind: {' '.join(str(error).split())[:300]}") from None


def require_same_model(checkpoint: Path, description: Description, config: EagleConfig) -> None:
    """Raise a UserError that names the first differing number unless the checkpoint was written by this model.

    Numbers that a recipe leaves out count as their defaults, on both sides.
    """
    theirs = effective_numbers(model_of(checkpoint, description))
    difference = _first_difference(theirs, effective_numbers(config), "")
    if difference:
        raise UserError(f"{checkpoint} holds another model: {difference}")


def require_whole(checkpoint: Path, description: Description) -> None:
    """Raise a UserError if ``checkpoint`` holds adapters alone."""
    if description.base:
        raise UserError(
            f"{checkpoint} holds LoRA's adapters of the base {description.base} and no whole model: "
            "megatron-eagle convert megatron-to-hf merges the two"
        )


def require_adapters(checkpoint: Path, description: Description, base: str) -> None:
    """Raise a UserError unless ``checkpoint`` holds adapters, and of the base with this digest."""
    if not description.base:
        raise UserError(f"{checkpoint} holds a whole model, with the recipe's lora adapters were to be found there")
    if description.base != base:
        raise UserError(f"{checkpoint} holds adapters of the base {description.base}, the recipe's base is {base}")


def effective_numbers(config: EagleConfig) -> dict[str, Any]:
    """Every number of a model as plain data, an encoder's defaults included."""
    encoders = [
        {"kind": settings["kind"], **TypeAdapter(Any).dump_python(encoder_config(settings), mode="json")}
        for settings in config.encoders
    ]
    return {**json.loads(json.dumps(asdict(config))), "encoders": encoders}


def _first_difference(theirs: Any, ours: Any, where: str) -> str | None:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        pairs = [(key, theirs.get(key), ours.get(key)) for key in sorted(theirs.keys() | ours.keys())]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = [(str(number), *pair) for number, pair in enumerate(zip(theirs, ours, strict=True))]
    else:
        return None if theirs == ours else f"{where} is {theirs!r} there, {ours!r} in the recipe"
    found = (_first_difference(a, b, f"{where}.{key}" if where else key) for key, a, b in pairs)
    return next((difference for difference in found if difference), None)


def load_training_state(
    checkpoint: Path, description: Description, state: TrainingState, groups: Groups
) -> bytes | None:
    """Restore weights, optimizer, schedule and RNG to continue a stage; returns the position in the data (readers).

    A running mean that the checkpoint lacks begins with its weights.
    """
    parts = optimizer_parts(state, is_loading=True)
    wanted = sharded_state(state, parts)

    def there(names: Collection[str]) -> dict[str, Any]:
        return {key: value for key, value in wanted.items() if key != "ema" or has_ema(names)}

    load_state(state, parts, _load(there, checkpoint), description.step)
    restore_random_state(torch.load(own_file(checkpoint, PROCESS_FILE, groups.rank), weights_only=True))
    if not groups.is_reader:
        return None
    return bytes(torch.load(own_file(checkpoint, POSITION_FILE, groups.dp_rank), weights_only=True).numpy())


def load_weights(
    checkpoint: Path, modules: Sequence[MegatronModule], which: Which = "base", *, ema: bool = False
) -> None:
    """Load the weights alone, in whatever layout ``modules`` (parts of an Eagle) are built.

    which: ``base`` is all of a model without adapters, and leaves those of one with adapters what they are. ema: the
    running mean instead of the weights that trained; UserError if the checkpoint has none.
    """
    weights = sharded_weights(modules, which)

    def chosen(names: Collection[str]) -> dict[str, Any]:
        if not ema:
            return weights
        require_ema(checkpoint, names)
        return averaged_weights(weights, names)

    load_modules(modules, _load(chosen, checkpoint), which)


def has_ema(names: Collection[str]) -> bool:
    """Whether the checkpoint whose tensors have these ``names`` holds a running mean."""
    return any(name.startswith(EMA) for name in names)


def require_ema(checkpoint: Path, names: Collection[str]) -> None:
    """Raise a UserError unless ``checkpoint``, whose tensors have these ``names``, holds a running mean."""
    if not has_ema(names):
        raise UserError(f"{checkpoint} holds no running mean of the weights: its stage was trained without the key ema")


def _load(wanted: Callable[[Collection[str]], dict[str, Any]], checkpoint: Path) -> dict[str, Any]:
    """What is ``wanted`` of a checkpoint with tensors of these names."""
    checksums.verify(checkpoint)
    template = wanted(safe_index.verify(checkpoint).state_dict_metadata.keys())
    try:
        return dist_checkpointing.load(template, str(checkpoint))
    except (CheckpointingException, CheckpointException, OSError, KeyError) as error:  # torch's is no Exception
        raise UserError(f"{checkpoint} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def own_file(checkpoint: Path, name: str, number: int) -> Path:
    """The file of rank ``number``, or of rank 0 in a run of another size: a planned stream's position is everyone's."""
    own = checkpoint / name.format(number)
    return own if own.exists() else checkpoint / name.format(0)
