"""Training checkpoints: Megatron's sharded torch_dist format, written so that one exists whole or not at all.

    runs/<name>/checkpoints/<stage>/
        step_00000250/            weights, optimizer, schedule (torch_dist), position in the data and RNG per process
            checkpoint.json       what it is: stage, step, model, layout; read before any tensor
        latest                    name of the newest whole checkpoint; moved last

A save is written into ``step_N.partial`` and renamed when every process is done, so a ``kill -9`` at any moment leaves
the checkpoint before it untouched. Weights can be loaded in another layout; exact continuation needs the same number of
data-parallel ranks, because the position in the data is kept per rank.
"""

import json
import os
import queue
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_eagle import __version__
from megatron_eagle.errors import UserError
from megatron_eagle.model.config import EagleConfig
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.training.engine import Engine

LATEST = "latest"
DESCRIPTION = "checkpoint.json"
# 'fully_reshardable' is the one sharding of the distributed optimizer that loads in any layout.
_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds: its place in the run, and the model it belongs to (``EagleConfig`` as a dict).

    rejected_total: samples skipped in the stage up to this step.
    peak_rss_bytes: highest resident memory of each process so far, added up over all of them.
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
    version: str = __version__

    @property
    def complete(self) -> bool:
        """Whether the stage had reached its last step."""
        return self.step >= self.steps


def find_latest(stage_folder: Path) -> Path | None:
    """The newest whole checkpoint below ``stage_folder``, or None."""
    try:
        name = (stage_folder / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    return stage_folder / name


def read_description(checkpoint: Path) -> Description:
    """Read what ``checkpoint`` is; UserError if it is not a checkpoint of this project."""
    try:
        return Description(**json.loads((checkpoint / DESCRIPTION).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint} is not a checkpoint of megatron-eagle: {error}") from None


def require_same_model(checkpoint: Path, description: Description, config: EagleConfig) -> None:
    """Raise a UserError that names the first differing number unless the checkpoint was written by this model."""
    difference = _first_difference(description.model, json.loads(json.dumps(asdict(config))), "")
    if difference:
        raise UserError(f"{checkpoint} holds another model: {difference}")


def _first_difference(theirs: Any, ours: Any, where: str) -> str | None:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        pairs = [(key, theirs.get(key), ours.get(key)) for key in sorted(theirs.keys() | ours.keys())]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = [(str(number), *pair) for number, pair in enumerate(zip(theirs, ours, strict=True))]
    else:
        return None if theirs == ours else f"{where} is {theirs!r} there, {ours!r} in the recipe"
    found = (_first_difference(a, b, f"{where}.{key}" if where else key) for key, a, b in pairs)
    return next((difference for difference in found if difference), None)


def save_checkpoint(
    stage_folder: Path,
    description: Description,
    engine: Engine,
    groups: Groups,
    data_position: bytes | None,
    *,
    keep: int,
) -> Path:
    """Write a whole checkpoint (all processes call this together) and delete all but the newest ``keep``.

    data_position: the stream's state on readers, None elsewhere.
    """
    final = stage_folder / f"step_{description.step:08d}"
    partial = final.with_suffix(".partial")
    _on_rank_zero(lambda: _start_partial(partial))
    # Megatron collects the writer's results through a server process of its own, which outlives a killed trainer. This
    # save is not handed to another process, so an ordinary queue does.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(
        _sharded_state(engine, is_loading=False),
        str(partial),
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
        preprocess_common_before_consistancy_check=_without_optimizer,
        content_metadata=_CONTENT,
    )
    torch.save(_process_state(data_position), _process_file(partial, groups))
    dist.barrier()
    _on_rank_zero(lambda: _publish(partial, final, description, keep))
    return final


def load_training_state(checkpoint: Path, description: Description, engine: Engine, groups: Groups) -> bytes | None:
    """Restore weights, optimizer, schedule and RNG to continue a stage; returns the position in the data (readers)."""
    if description.data_parallel_size != groups.dp_size:
        raise UserError(
            f"{checkpoint} was written by {description.data_parallel_size} data-parallel ranks, this run has "
            f"{groups.dp_size}: its position in the data is kept per rank; continue with as many, or start the stage "
            "again in a fresh folder"
        )
    state = _load(_sharded_state(engine, is_loading=True), checkpoint)
    _load_weights(engine.models, state)
    engine.optimizer.load_state_dict(state["optimizer"])
    engine.scheduler.load_state_dict(state["scheduler"])
    return _restore_process_state(torch.load(_process_file(checkpoint, groups), weights_only=True))


def load_weights(checkpoint: Path, models: Sequence[EagleModel]) -> None:
    """Load the weights alone, in whatever layout ``models`` are built."""
    _load_weights(models, _load(_sharded_weights(models), checkpoint))


def _load(template: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(template, str(checkpoint))
    except (CheckpointingException, OSError, KeyError) as error:
        raise UserError(f"{checkpoint} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def _sharded_weights(models: Sequence[EagleModel]) -> dict[str, Any]:
    metadata = {**_CONTENT, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {f"model{number}": model.sharded_state_dict(metadata=metadata) for number, model in enumerate(models)}


def _sharded_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    state = _sharded_weights(engine.models)
    weights = state if len(engine.models) > 1 else state["model0"]
    state["optimizer"] = engine.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_CONTENT)
    state["scheduler"] = engine.scheduler.state_dict()
    return state


def _without_optimizer(common: dict[str, Any]) -> dict[str, Any]:
    """What must be equal on all processes; the optimizer's part is not where a process has nothing to train."""
    return {name: value for name, value in common.items() if name != "optimizer"}


def _load_weights(models: Sequence[EagleModel], state: dict[str, Any]) -> None:
    for number, model in enumerate(models):
        model.load_state_dict(state[f"model{number}"], strict=True)


def _process_file(checkpoint: Path, groups: Groups) -> Path:
    return checkpoint / f"process_{groups.rank:05d}.pt"


def _process_state(data_position: bytes | None) -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    position = None if data_position is None else torch.frombuffer(bytearray(data_position), dtype=torch.uint8)
    return {
        "data_position": position,
        "python": [version, list(numbers), gauss],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _restore_process_state(state: dict[str, Any]) -> bytes | None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    return None if state["data_position"] is None else state["data_position"].numpy().tobytes()


def _on_rank_zero(action: Any) -> None:
    """Run ``action`` on rank 0 while the others wait; its failure is everybody's, so that nobody waits for ever."""
    message: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            message = [f"cannot write checkpoint: {error}"]
    dist.broadcast_object_list(message, src=0)
    if message[0] is not None:
        raise UserError(message[0])


def _start_partial(partial: Path) -> None:
    for leftover in partial.parent.glob("*.partial"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def _publish(partial: Path, final: Path, description: Description, keep: int) -> None:
    (partial / DESCRIPTION).write_text(json.dumps(asdict(description), indent=1), encoding="utf-8")
    for file in partial.iterdir():
        _flush(file)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(final.parent)
    pointer = final.parent / f"{LATEST}.new"
    pointer.write_text(final.name, encoding="utf-8")
    _flush(pointer)
    pointer.rename(final.parent / LATEST)
    _flush(final.parent)
    for old in sorted(final.parent.glob("step_*[0-9]"))[:-keep]:
        shutil.rmtree(old)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
