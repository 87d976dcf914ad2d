"""Runs the trainer's own code for one process of a large job, without its numbers and without the other processes.

Every floating-point tensor (and every larger block of pixels) lies on the meta device: it has a shape and a type and no
memory. Whole numbers are real, because the code's path depends on them: borders of segments, places of tiles, sizes of
messages. Whatever the code sends to other processes is written down instead, in order: operation, members of the group,
sizes. What one process broadcasts in whole numbers reaches those walked after it. So hours of hundreds of GPUs become
a list that can be compared (``deadlock_check.py``). Like PyTorch's FakeTensorMode, which cannot be used here: it knows
no values at all, and the sizes of this project's messages follow from values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_eagle.compat.torch_dispatch import (
    READ_ONE_NUMBER,
    TorchDispatchMode,
    group_of,
    tree_leaves,
    tree_map_only,
)

LARGEST_REAL_BYTES = 1 << 18  # of uint8: messages of words are shorter, a tile's pixels longer
_META = torch.device("meta")
_CPU = torch.device("cpu")
_PEER_TO_PEER = ("send", "recv_", "recv_any_source_")


@dataclass(frozen=True)
class Call:
    """One exchange. members: global ranks of its group, or (sender, receiver). sizes: of all tensors, in bytes and as
    dtype and elements; where members differ in what they give (all-to-all), sizes are what this one gives to each."""

    operation: str
    members: tuple[int, ...]
    sizes: tuple[Any, ...]


class _Numbers(TorchFunctionMode):
    """``torch.tensor`` reads its elements past any dispatch: let it find a number in each."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor:
            args = tree_map_only(torch.Tensor, lambda t: 1.0 if t.is_meta else t, args)
        return func(*args, **(kwargs or {}))


class SymbolicRank(TorchDispatchMode):
    """``with SymbolicRank(recorded) as symbolic: ...``; then ``symbolic.calls``.

    recorded: broadcasts so far, by group; may be shared.
    """

    def __init__(self, recorded: dict[tuple[int, ...], list[torch.Tensor]]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._recorded, self._read = recorded, dict.fromkeys(recorded, 0)
        self._numbers = _Numbers()

    def __enter__(self) -> "SymbolicRank":
        self._numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        namespace, _, name = func.name().partition("::")  # type: ignore[attr-defined]
        if namespace == "c10d":
            return self._exchange(name.split(".")[0], func, args)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        weightless = any(leaf.is_meta for leaf in leaves)
        if name == READ_ONE_NUMBER and weightless:
            return 1.0 if leaves[0].is_floating_point() else 1
        if weightless:
            args, kwargs = tree_map_only(torch.Tensor, _weightless, (args, kwargs))
            if name.startswith("copy_") and not leaves[0].is_meta:
                return leaves[0]
        if kwargs.get("device") is not None and (weightless or _allocates_weights(args, kwargs, leaves)):
            kwargs["device"] = _META
            kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)

    def _exchange(self, operation: str, func: Any, args: Any) -> Any:
        ranks = dist.get_process_group_ranks(group_of(args))
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if operation in _PEER_TO_PEER:
            own, other = dist.get_rank(), ranks[args[2]]
            sending = operation == "send"
            pair = (own, other) if sending else (other, own)
            self.calls.append(Call("send" if sending else "recv", pair, _sizes(tensors)))
        elif operation == "alltoall_base_":
            received, given, _, take, give = args[:5]
            take, give = _shares(take, received, len(ranks)), _shares(give, given, len(ranks))
            self.calls.append(Call(operation, tuple(ranks), (*_sizes([given[:1]]), tuple(give), tuple(take))))
            if (sum(give), sum(take)) != (len(given), len(received)):
                raise ValueError(f"{len(given)} rows for shares {give}, {len(received)} are received from {take}")
            args = (*args[:3], [], [], *args[5:])
        else:
            self.calls.append(Call(operation, tuple(ranks), _sizes(tensors)))
        if operation == "broadcast_":
            self._broadcast(tuple(ranks), ranks[args[2]], tensors)
        if operation == "alltoall_base_" or any(tensor.is_meta for tensor in tensors):
            args = tree_map_only(torch.Tensor, lambda tensor: torch.empty(0), args)
        return func(*args)

    def _broadcast(self, members: tuple[int, ...], root: int, tensors: list[torch.Tensor]) -> None:
        whole = [tensor for tensor in tensors if not tensor.is_meta]
        broadcasts = self._recorded.setdefault(members, [])
        if root == dist.get_rank():
            broadcasts += [tensor.clone() for tensor in whole]
            return
        for tensor in whole:
            number = self._read.get(members, 0)
            if number < len(broadcasts) and broadcasts[number].shape == tensor.shape:
                tensor.copy_(broadcasts[number])
            self._read[members] = number + 1


def _shares(sizes: list[int], rows: torch.Tensor, members: int) -> list[int]:
    """How many of ``rows`` belong to each member; none are said where all have as many."""
    return list(sizes) or [len(rows) // members] * members


def _weightless(tensor: torch.Tensor) -> torch.Tensor:
    return (
        tensor
        if tensor.is_meta
        else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)
    )


def _allocates_weights(args: Any, kwargs: dict[str, Any], leaves: list[torch.Tensor]) -> bool:
    """Whether a factory asks for what has no memory here."""
    if leaves:
        return False
    dtype = kwargs.get("dtype")
    if dtype is None:  # arange, full and tensors of Python's numbers follow these, everything else is float
        numbers = [number for number in args if isinstance(number, int | float)]
        whole = bool(numbers) and all(isinstance(number, int) for number in numbers)
        dtype = torch.int64 if whole else torch.get_default_dtype()
    if dtype == torch.uint8:
        return torch.Size(args[0]).numel() > LARGEST_REAL_BYTES
    return bool(dtype.is_floating_point)


def _sizes(tensors: list[torch.Tensor]) -> tuple[tuple[str, int], ...]:
    return tuple((str(tensor.dtype).removeprefix("torch."), tensor.numel()) for tensor in tensors)
