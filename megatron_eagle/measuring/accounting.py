"""Counts the bytes of every tensor that lives while a piece of code runs, on any device, meta included.

A CPU has no ``torch.cuda.max_memory_allocated``. This looks at what every operator returns, counts each storage once,
and takes it off again when the last tensor on it is gone, autograd's saved ones included. What an operator uses inside
and frees before it returns is not seen; neither does a caching allocator's rounding exist here.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_eagle.compat.gradient_buffers import gradient_tensors, weight_tensors
from megatron_eagle.compat.torch_dispatch import TorchDispatchMode, storage_key, tree_leaves
from megatron_eagle.model.lora import packed_tensors
from megatron_eagle.training.engine import Engine


class TensorAccounting(TorchDispatchMode):
    """``with TensorAccounting() as seen: ...`` counts the tensors made inside; ``seen.peak`` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {storage_key(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _plain(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _plain(leaf) and storage_key(leaf.untyped_storage()) not in before:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage_key(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.live -= size
        self._known.pop(key, None)


def _plain(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all ``tensors``, those that share memory counted once."""
    return sum({storage_key(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())


def held_bytes(engine: Engine) -> dict[str, int]:
    """What a training process holds all the time: ``weights``, ``gradients`` and ``optimizer`` states.

    The engine has made a step: Adam's moments exist from then on.
    """
    owners = engine.gradient_owners()
    gradients = [tensor for owner in owners for tensor in gradient_tensors(owner)]
    weights = [p.data for module, _ in engine.weight_owners() for p in module.parameters()]
    weights += packed_tensors(module for module, _ in engine.weight_owners())
    weights += [tensor for owner in owners for tensor in weight_tensors(owner)]
    held = {storage_key(t.untyped_storage()) for t in weights}
    state: list[torch.Tensor] = []
    for part in engine.optimizer.chained_optimizers:
        inner = part.optimizer
        if inner is None:
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                tensors = [parameter.data, *(v for v in inner.state[parameter].values() if torch.is_tensor(v))]
                state += [t for t in tensors if storage_key(t.untyped_storage()) not in held]
    state += engine.ema.means if engine.ema else []
    return {
        "weights": storage_bytes(weights),
        "gradients": storage_bytes(gradients),
        "optimizer": storage_bytes(state),
    }
