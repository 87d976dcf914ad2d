"""What of a training process goes into a checkpoint, and how it is restored.

Weights and the optimizer's moments carry the names and shapes of an undivided model (Megatron's ``ShardedTensor``), so
any layout and either placement of the encoders loads them. Of the optimizer only tensors are stored, and of the
schedule only the step is read back: rates, weight decay, warm-up and decay follow from the recipe and the step.

Extra states are not stored. They are the place for scales of FP8 training that follow from earlier steps, which no
recipe here has (``config/fp8.py``); of the others they hold settings that the recipe has, too. Which module has one
depends on the transformer implementation, and Transformer Engine unpickles what it is given. So each module keeps its
own, and a checkpoint has the same keys whichever implementation wrote it, and loads into any.
"""

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from megatron_eagle.checkpoint.safe_index import EXTRA_STATE, holds_nothing
from megatron_eagle.config.lora import is_adapter
from megatron_eagle.errors import UserError

# 'fully_reshardable' is the one sharding of the distributed optimizer that loads in any layout.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
}
Parts = list[dict[str, Any]]
Which = Literal["all", "base", "adapters"]
EMA = "ema."  # in front of the name of a weight: the name of its running mean


class Averaged(Protocol):
    """A running mean of the weights that train, and the weights' ``main_grad``, through which it goes in and out."""

    def to_gradients(self) -> None:
        """Make every ``main_grad`` the whole of a mean; collective."""

    def from_gradients(self) -> None:
        """Take the mean from there."""


@dataclass(frozen=True)
class TrainingState:
    """The objects of one process whose state a checkpoint holds; loading changes them in place.

    modules: all that have weights, parts of an Eagle. optimizers: in the order in which they step; processes must agree
    on both orders, because names in the checkpoint follow from them. weights: which of the modules' are stored. ema:
    the running mean, if there is one.
    """

    modules: tuple[MegatronModule, ...]
    optimizers: tuple[MegatronOptimizer, ...]
    scheduler: OptimizerParamScheduler
    weights: Which = "all"
    ema: Averaged | None = None


def sharded_weights(modules: Sequence[MegatronModule], which: Which = "all") -> dict[str, Any]:
    """The weights of ``modules`` under their global names; UserError if an extra state is not empty.

    which: all, those of LoRA's adapters, or all but those.
    """
    metadata = {**CONTENT, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {
        f"model{number}": {
            name: _without_extra_state(entry, fp8=bool(getattr(module.config, "fp8", None)))
            for name, entry in module.sharded_state_dict(metadata=metadata).items()
            if _is(name, which)
        }
        for number, module in enumerate(modules)
    }


def _is(name: str, which: Which) -> bool:
    return which == "all" or is_adapter(name) == (which == "adapters")


def _without_extra_state(entry: Any, *, fp8: bool = False) -> Any:
    """``entry``, or the module's own extra state, marked so that it is neither stored nor asked for.

    fp8: whether the module was built to multiply so, by a recipe whose states hold no numbers.
    """
    if not (isinstance(entry, ShardedObject) and entry.key.endswith(EXTRA_STATE)):
        return entry
    if not (fp8 or holds_nothing(entry.data)):
        raise UserError(f"{entry.key} is not empty: scales of FP8 training are not stored in checkpoints")
    return LocalNonpersistentObject(entry.data)


def averaged_weights(weights: dict[str, Any], stored: Collection[str]) -> dict[str, Any]:
    """``sharded_weights`` with the running mean asked for instead of each weight that has one.

    stored: names of a checkpoint's tensors.
    """
    return {
        model: {
            name: replace(entry, key=EMA + entry.key) if EMA + getattr(entry, "key", "") in stored else entry
            for name, entry in entries.items()
        }
        for model, entries in weights.items()
    }


def load_modules(modules: Sequence[MegatronModule], state: dict[str, Any], which: Which = "all") -> None:
    """Hand loaded weights, in the structure of ``sharded_weights``, to the modules; the others stay what they are."""
    for number, module in enumerate(modules):
        module.load_state_dict(state[f"model{number}"], strict=which == "all")


def optimizer_parts(state: TrainingState, *, is_loading: bool) -> Parts:
    """What each optimizer would save, in Megatron's own structure; its tensors know their global names."""
    weights = sharded_weights(state.modules)
    return [part.sharded_state_dict(weights, is_loading=is_loading, metadata=CONTENT) for part in state.optimizers]


def sharded_state(state: TrainingState, parts: Parts) -> dict[str, Any]:
    """All that is stored of ``state``; ``parts`` are its ``optimizer_parts``.

    Of a running mean, what ``to_gradients`` has put into the gradient buffers.
    """
    tensors = [leaf for leaf in nested_values(parts) if isinstance(leaf, ShardedBase)]
    weights = sharded_weights(state.modules, state.weights)
    stored = {**weights, "scheduler": state.scheduler.state_dict()}
    means = {
        f"{number}.{name}": make_sharded_optimizer_tensor(
            weights[f"model{number}"][name], parameter.main_grad, prefix=EMA.removesuffix(".")
        )
        for number, name, parameter in _averaged(state)
    }
    if means:
        stored["ema"] = means
    if tensors:  # a process may have nothing to train
        stored["optimizer"] = {str(number): tensor for number, tensor in enumerate(tensors)}
    return stored


def load_state(state: TrainingState, parts: Parts, loaded: dict[str, Any], step: int) -> None:
    """Hand what was ``loaded``, in the structure of ``sharded_state``, to the objects that ``parts`` came from."""
    load_modules(state.modules, loaded, state.weights)
    if state.ema and "ema" in loaded:
        for number, name, parameter in _averaged(state):
            parameter.main_grad.copy_(loaded["ema"][f"{number}.{name}"])
        state.ema.from_gradients()
    _load_optimizers(state.optimizers, parts, loaded.get("optimizer", {}), step)
    # Megatron's load_state_dict would bring the saved schedule along and keep the recipe's peak: half of each.
    state.scheduler.step(increment=loaded["scheduler"]["num_steps"] - state.scheduler.num_steps)


def _averaged(state: TrainingState) -> Iterator[tuple[int, str, Any]]:
    """(number of the module, name, parameter) of each weight with a running mean."""
    for number, module in enumerate(state.modules if state.ema else ()):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield number, name, parameter


def _load_optimizers(optimizers: Sequence[MegatronOptimizer], parts: Parts, tensors: dict[str, Any], step: int) -> None:
    loaded = iter(range(len(tensors)))

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, ShardedBase):
            return tensors[str(next(loaded))]
        return leaf.unwrap() if isinstance(leaf, LocalNonpersistentObject) else leaf

    dict_list_map_inplace(fill, parts)
    for optimizer, part in zip(optimizers, parts, strict=True):
        optimizer.load_state_dict(part)
        for group in optimizer.param_groups:
            group["step"] = step


def random_state() -> dict[str, Any]:
    """The states of this process's random number generators."""
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue with the random numbers that ``random_state`` was followed by."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
