"""Seeing every operation that PyTorch runs, with its tensors: for counting memory and for walking a job symbolically.

Leaned on, in torch:

- ``utils._python_dispatch.TorchDispatchMode`` and ``utils._pytree``: PyTorch describes ``__torch_dispatch__`` and
  builds its own counters on the two, but has not moved them out of private modules;
- ``UntypedStorage._cdata``: the address of a storage object. The public ``data_ptr`` is that of its memory, of which a
  storage on the meta device has none;
- ``ScriptObject._type()``: tells the process group among a collective's arguments; there is no other way to ask;
- the collectives' positional arguments (``c10d::broadcast_`` and the others in ``COLLECTIVES``), and that reading one
  number of a tensor is ``aten::_local_scalar_dense``: not private, but nowhere promised.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["TorchDispatchMode", "group_of", "storage_key", "tree_leaves", "tree_map_only"]

READ_ONE_NUMBER = "_local_scalar_dense"  # of the namespace aten: what Tensor.item() is

# Of the namespace c10d: the leading arguments by which dry_run/symbolic_rank.py reads who sends what to whom.
COLLECTIVES = {
    "broadcast_": ("tensors", "process_group", "root_rank"),
    "send": ("tensors", "process_group", "dst"),
    "recv_": ("tensors", "process_group", "src"),
    "alltoall_base_": ("output", "input", "process_group", "output_split_sizes", "input_split_sizes"),
}


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that all tensors on ``storage`` share, on any device, as long as one of them lives."""
    return int(storage._cdata)


def group_of(arguments: Any) -> dist.ProcessGroup:
    """The process group among the arguments of an operation of the namespace c10d."""
    boxed = next(a for a in arguments if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
    return dist.ProcessGroup.unbox(boxed)
