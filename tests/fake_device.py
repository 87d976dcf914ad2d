"""A GPU that is not there: counts what would make the host wait for it, while real code computes on the CPU.

``with fake_device(*tensors) as waits:`` - the device is ``DEVICE``, which is "cpu:0"; the host's tensors are on plain
"cpu". PyTorch computes alike on both and forgets the index, so the storages on the device are kept in a list: those of
``tensors``, what is made with ``device=DEVICE`` or copied there, and everything computed from one of these. Code that
asks such a tensor for its device is told ``DEVICE``.

A wait is what ``torch.cuda.set_sync_debug_mode`` would report: a number or a whole tensor that comes to the host, an
operator whose result's size is a value on the device (``nonzero``, an index by a mask), a copy to the device that is
not asked for as ``non_blocking``. Not seen: copies that C++ code makes on its own, and pinned against pageable memory.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_eagle.compat.torch_dispatch import TorchDispatchMode, storage_key, tree_leaves

DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")
_PACKAGES = ("megatron_eagle/", "megatron/core/", "eagle_kernels/", "tests/")
_NOT_CALLERS = ("tests/fake_device.py", "megatron_eagle/compat/cpu.py")
_SIZED_BY_VALUES = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave",
}  # fmt: skip
_WHOLE_TO_HOST = {"cpu", "numpy", "tolist", "__array__"}


@contextmanager
def fake_device(*tensors: Tensor) -> Iterator["Counter[tuple[str, str]]"]:
    """Gives the waits so far: (operation, "file:function" of the innermost frame in this project or Megatron)."""
    book = _Book()
    for tensor in tensors:
        book.put(tensor)
    with _Operators(book), _Calls(book):
        yield book.waits


class _Book:
    """Which storages are on the device, and who waited for it. Storages are kept alive, so that none is named twice."""

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self._storages: dict[int, torch.UntypedStorage] = {}

    def has(self, value: Any) -> bool:
        return isinstance(value, Tensor) and storage_key(value.untyped_storage()) in self._storages

    def put(self, value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            self._storages[storage_key(storage)] = storage

    def take(self, value: Tensor) -> None:
        self._storages.pop(storage_key(value.untyped_storage()), None)

    def wait(self, operation: str) -> None:
        self.waits[operation, _caller()] += 1


def _caller() -> str:
    """ "file:function" of the innermost frame in this project or in Megatron."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        package = next((name for name in _PACKAGES if f"/{name}" in file), None)
        if package and not file.endswith(_NOT_CALLERS):
            return f"{package}{file.rpartition(f'/{package}')[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def _in_collective() -> bool:
    """Whether a collective of gloo's copies between its own buffers, which NCCL has not."""
    frame = sys._getframe(1)
    while frame.f_back is not None and ("/torch/" in (file := frame.f_code.co_filename) or file == __file__):
        if file.endswith("torch/distributed/distributed_c10d.py"):
            return True
        frame = frame.f_back
    return False


class _Calls(TorchFunctionMode):
    """What can be seen only where Python calls it, because on the CPU nothing happens."""

    def __init__(self, book: _Book) -> None:
        super().__init__()
        self.book = book

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, book = kwargs or {}, getattr(func, "__name__", ""), self.book
        if name == "__get__" and getattr(func, "__self__", None) is Tensor.device and book.has(args[0]):
            recomputing = sys._getframe(1).f_code.co_filename.endswith("torch/utils/checkpoint.py")
            return HOST if recomputing else DEVICE  # it compares with what C++ code saved
        if name in _WHOLE_TO_HOST and book.has(args[0]):
            book.wait(name)
            return self._copy(args[0], on_device=False) if name == "cpu" else func(*args, **kwargs)
        if func is torch.tensor and any(book.has(leaf) for leaf in tree_leaves(args)):
            book.wait("tensor of tensors")  # which it reads one by one
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            book.wait("tensor")
            made = func(*args, **{**kwargs, "device": HOST})
            return self._copy(made, on_device=True)
        if name == "to":
            return self._to(func, args, kwargs)
        if func is torch.autograd.backward:  # which would leave this mode outside
            run = torch.autograd._engine_run_backward
            with patch.object(torch.autograd, "_engine_run_backward", self._inside(run)):
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if kwargs.get("device") == HOST and _caller().startswith("megatron/core/"):
            book.put(result)  # asked for on CUDA; the platform for machines without a GPU turned that into the host
        return result

    def _inside(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self:
                return run(*args, **kwargs)

        return inside

    def _to(self, func: Any, args: Any, kwargs: Any) -> Any:
        book, (tensor, *rest) = self.book, args
        targets = [DEVICE if book.has(value) else HOST for value in rest if isinstance(value, Tensor)]
        targets += [
            torch.device(value) for value in (*rest, kwargs.get("device")) if isinstance(value, torch.device | str)
        ]
        if not targets:
            return func(*args, **kwargs)
        if (targets[0] == DEVICE) == book.has(tensor):  # where it is: at most another dtype
            others = [value for value in (*rest, kwargs.get("dtype")) if isinstance(value, torch.dtype | Tensor)]
            return func(tensor, others[0]) if others else tensor
        if targets[0] != DEVICE or not kwargs.get("non_blocking"):
            book.wait("to")
        return self._copy(func(*args, **kwargs), on_device=targets[0] == DEVICE)

    def _copy(self, tensor: Tensor, *, on_device: bool) -> Tensor:
        copy = tensor.clone()
        (self.book.put if on_device else self.book.take)(copy)
        return copy


class _Operators(TorchDispatchMode):
    """Everything else, autograd's own operators included."""

    def __init__(self, book: _Book) -> None:
        super().__init__()
        self.book = book

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, book = kwargs or {}, self.book
        on_device = any(book.has(leaf) for leaf in tree_leaves((args, kwargs)))
        namespace, _, name = func.name().partition("::")
        if on_device and namespace == "aten":
            self._look(name.split(".")[0], args, kwargs)
        result = func(*args, **kwargs)
        if on_device or kwargs.get("device") == DEVICE:
            for leaf in tree_leaves(result):
                book.put(leaf)
        return result

    def _look(self, name: str, args: Any, kwargs: Any) -> None:
        book = self.book
        if name in _SIZED_BY_VALUES:
            book.wait(name)
        elif name == "copy_":
            target, source = args[:2]
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            to_device = not book.has(source) and source.ndim and blocking
            if (not book.has(target) or to_device) and not _in_collective():
                book.wait(name)
        elif name in ("index", "index_put_"):
            picks = [pick for pick in args[1] if pick is not None]
            fills = name == "index_put_" and args[2].numel() == 1  # which PyTorch does as masked_fill
            masks = any(pick.dtype in (torch.bool, torch.uint8) for pick in picks)
            if (masks and not fills) or any(pick.ndim and not book.has(pick) for pick in picks):
                book.wait(name)
