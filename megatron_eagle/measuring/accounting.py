"""Counts the bytes of every tensor that lives while a piece of code runs, on any device, meta included.

A CPU has no ``torch.cuda.max_memory_allocated``. This looks at what every operator returns, counts each storage once,
and takes it off again when the last tensor on it is gone, autograd's saved ones included. What an operator uses inside
and frees before it returns is not seen; neither does a caching allocator's rounding exist here.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _plain(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _plain(leaf) and leaf.untyped_storage()._cdata not in before:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
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
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def held_bytes(engine: Engine) -> dict[str, int]:
    """What a training process holds all the time: ``weights``, ``gradients`` and ``optimizer`` states.

    The engine has made a step: Adam's moments exist from then on.
    """
    owners = engine.gradient_owners()
    gradients = [buffer.grad_data for owner in owners for buffer in owner.buffers]
    weights = [p.data for module, _ in engine.weight_owners() for p in module.parameters()]
    weights += [buffer.param_data for owner in owners for buffer in owner.buffers if buffer.param_data is not None]
    held = {t.untyped_storage()._cdata for t in weights}
    state: list[torch.Tensor] = []
    for part in engine.optimizer.chained_optimizers:
        inner = part.optimizer
        if inner is None:
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                tensors = [parameter.data, *(v for v in inner.state[parameter].values() if torch.is_tensor(v))]
                state += [t for t in tensors if t.untyped_storage()._cdata not in held]
    return {
        "weights": storage_bytes(weights),
        "gradients": storage_bytes(gradients),
        "optimizer": storage_bytes(state),
    }
