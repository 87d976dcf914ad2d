"""Counts the bytes of every tensor that lives while a piece of code runs, on any device, meta included.

A CPU has no ``torch.cuda.max_memory_allocated``. This looks at what every operator returns, counts each storage once,
and takes it off again when the last tensor on it is gone, autograd's saved ones included. What an operator uses inside
and frees before it returns is not seen; neither does a caching allocator's rounding exist here.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorAccounting(TorchDispatchMode):
    """``with TensorAccounting() as seen: ...`` counts the tensors made inside; ``seen.peak`` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.finalize] = {}
        self._ignored: set[int] = set()

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Do not count these: they were there before."""
        self._ignored |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def restart_peak(self) -> None:
        self.peak = self.live

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
        if key in self._known or key in self._ignored:
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
