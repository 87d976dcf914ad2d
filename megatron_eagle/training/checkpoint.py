"""Training checkpoints: Megatron's sharded torch_dist format, written so that one exists whole or not at all.

    runs/<name>/checkpoints/<stage>/
        step_00000250/            weights, optimizer, schedule (torch_dist), position in the data and RNG per process
            checkpoint.json       what it is: stage, step, model, layout; read before any tensor
            checksums.json        size and CRC-32 of every file; held against the files before they are loaded
        latest                    name of the newest whole checkpoint; moved last

A save is written into ``step_N.partial`` and renamed when every process is done, so a ``kill -9`` at any moment leaves
the checkpoint before it untouched. Weights and the optimizer's moments are stored under the names of an undivided
model, so any layout and either placement of the encoders loads them. A planned stream continues at any number of
data-parallel ranks; a stream with ``reading.order: buffer`` refuses another number than it was saved by.
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
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.transformer.module import MegatronModule

from megatron_eagle import __version__
from megatron_eagle.errors import UserError
from megatron_eagle.model.config import EagleConfig
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.training import checksums
from megatron_eagle.training.engine import Engine

LATEST = "latest"
DESCRIPTION = "checkpoint.json"
PROCESS_FILE = "process_{:05d}.pt"  # random states, one a process
POSITION_FILE = "position_{:05d}.pt"  # place in the data, one a data-parallel rank
# 'fully_reshardable' is the one sharding of the distributed optimizer that loads in any layout.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
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


def find_good(stage_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what was written, and what is wrong with each newer one.

    Reads whole checkpoints; one process does it for all, because all must continue from the same.
    """
    answer: list[Any] = [None, []]
    if dist.get_rank() == 0:
        for candidate in sorted(stage_folder.glob("step_*[0-9]"), reverse=True):
            found = checksums.damage(candidate)
            if not found:
                answer[0] = candidate
                break
            answer[1].append(f"{candidate} is damaged: {'; '.join(found)}")
    dist.broadcast_object_list(answer, src=0)
    return answer[0], answer[1]


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
        _sharded_state(engine, _optimizer_parts(engine, is_loading=False)),
        str(partial),
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
        content_metadata=CONTENT,
    )
    torch.save(_random_state(), partial / PROCESS_FILE.format(groups.rank))
    if data_position is not None:
        position = torch.frombuffer(bytearray(data_position), dtype=torch.uint8)
        torch.save(position, partial / POSITION_FILE.format(groups.dp_rank))
    dist.barrier()
    _on_rank_zero(lambda: _describe(partial, description))
    measured = checksums.measure(partial)
    _on_rank_zero(lambda: _publish(partial, final, measured, keep))
    return final


def load_training_state(checkpoint: Path, description: Description, engine: Engine, groups: Groups) -> bytes | None:
    """Restore weights, optimizer, schedule and RNG to continue a stage; returns the position in the data (readers)."""
    parts = _optimizer_parts(engine, is_loading=True)
    state = _load(_sharded_state(engine, parts), checkpoint)
    _load_weights(_modules(engine), state)
    _load_optimizer(engine, parts, state.get("optimizer", {}), description.step)
    engine.scheduler.load_state_dict(state["scheduler"])
    _restore_random_state(_read_own(checkpoint, PROCESS_FILE, groups.rank))
    return bytes(_read_own(checkpoint, POSITION_FILE, groups.dp_rank).numpy()) if groups.is_reader else None


def load_weights(checkpoint: Path, modules: Sequence[MegatronModule]) -> None:
    """Load the weights alone, in whatever layout ``modules`` (parts of an Eagle) are built."""
    _load_weights(modules, _load(_sharded_weights(modules), checkpoint))


def _load(template: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    checksums.verify(checkpoint)
    try:
        return dist_checkpointing.load(template, str(checkpoint))
    except (CheckpointingException, OSError, KeyError) as error:
        raise UserError(f"{checkpoint} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def _modules(engine: Engine) -> list[MegatronModule]:
    return [module for module, _ in engine.weight_owners()]


def _sharded_weights(modules: Sequence[MegatronModule]) -> dict[str, Any]:
    metadata = {**CONTENT, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {f"model{number}": module.sharded_state_dict(metadata=metadata) for number, module in enumerate(modules)}


def _load_weights(modules: Sequence[MegatronModule], state: dict[str, Any]) -> None:
    for number, module in enumerate(modules):
        module.load_state_dict(state[f"model{number}"], strict=True)


def _optimizer_parts(engine: Engine, *, is_loading: bool) -> list[dict[str, Any]]:
    """What each optimizer of the chain would save, in Megatron's own structure; its tensors know their global names."""
    weights = _sharded_weights(_modules(engine))
    chain = engine.optimizer.chained_optimizers
    return [part.sharded_state_dict(weights, is_loading=is_loading, metadata=CONTENT) for part in chain]


def _sharded_state(engine: Engine, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What is stored: of the optimizer its tensors only, because the rest follows from the recipe and the step."""
    tensors = [leaf for leaf in nested_values(parts) if isinstance(leaf, ShardedBase)]
    state = {**_sharded_weights(_modules(engine)), "scheduler": engine.scheduler.state_dict()}
    if tensors:  # a process may have nothing to train
        state["optimizer"] = {str(number): tensor for number, tensor in enumerate(tensors)}
    return state


def _load_optimizer(engine: Engine, parts: list[dict[str, Any]], tensors: dict[str, Any], step: int) -> None:
    """Hand the loaded ``tensors`` to the optimizers that ``parts`` came from."""
    loaded = iter(range(len(tensors)))

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, ShardedBase):
            return tensors[str(next(loaded))]
        return leaf.unwrap() if isinstance(leaf, LocalNonpersistentObject) else leaf

    dict_list_map_inplace(fill, parts)
    for optimizer, part in zip(engine.optimizer.chained_optimizers, parts, strict=True):
        optimizer.load_state_dict(part)
        for group in optimizer.param_groups:
            group["step"] = step


def _read_own(checkpoint: Path, name: str, number: int) -> Any:
    """The file of rank ``number``, or of rank 0 in a run of another size: a planned stream's position is everyone's."""
    own = checkpoint / name.format(number)
    return torch.load(own if own.exists() else checkpoint / name.format(0), weights_only=True)


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state(), "cuda": cuda}


def _restore_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


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


def _describe(partial: Path, description: Description) -> None:
    (partial / DESCRIPTION).write_text(json.dumps(asdict(description), indent=1), encoding="utf-8")


def _publish(partial: Path, final: Path, measured: dict[str, dict[str, int]], keep: int) -> None:
    checksums.write(partial, measured)
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
