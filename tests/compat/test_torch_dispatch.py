"""compat/torch_dispatch.py."""

import pytest
import torch
import torch.distributed as dist
from contracts import contract, the

from megatron_eagle.compat.fake_processes import join_alone


def seen_in(run):
    """Names and arguments of all operations of ``run``."""
    from megatron_eagle.compat.torch_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen[function.name()] = args
            return function(*args, **(kwargs or {}))

    with Watch() as watch:
        run()
    return watch.seen


@contract(
    "PyTorch moved TorchDispatchMode out of torch.utils._python_dispatch, or no longer shows it all operations, or "
    "reads one number by another one than aten::_local_scalar_dense: measuring/accounting.py and "
    "dry_run/symbolic_rank.py are made of it"
)
def test_contract_every_operation_is_seen():
    the("torch.utils._python_dispatch:TorchDispatchMode")
    from megatron_eagle.compat.torch_dispatch import READ_ONE_NUMBER

    seen = seen_in(lambda: torch.empty(2, device="meta").add(1) is not None and torch.ones(1).item())
    assert {"aten::add.Tensor", f"aten::{READ_ONE_NUMBER}"} <= set(seen)


@contract("PyTorch moved tree_leaves or tree_map_only out of torch.utils._pytree: operations take such trees")
def test_contract_trees_of_tensors():
    leaves, change = (the(f"torch.utils._pytree:{name}") for name in ("tree_leaves", "tree_map_only"))
    assert leaves(([1, 2], {"a": (3,)})) == [1, 2, 3]
    assert change(int, str, [1, {"a": 2.0}]) == ["1", {"a": 2.0}]


@contract(
    "PyTorch's storages no longer have their address in _cdata, or views no longer share it: "
    "measuring/accounting.py counts each memory once, on the meta device, too"
)
def test_contract_address_of_a_storage():
    the("torch:UntypedStorage._cdata")
    from megatron_eagle.compat.torch_dispatch import storage_key

    first, second = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    assert storage_key(first.untyped_storage()) == storage_key(first[1:].untyped_storage())
    assert storage_key(first.untyped_storage()) != storage_key(second.untyped_storage())


@contract("PyTorch no longer hands collectives a boxed ProcessGroup, which dry_run/symbolic_rank.py reads members from")
def test_contract_group_of_a_collective():
    from megatron_eagle.compat.torch_dispatch import group_of

    join_alone(0, 4)
    try:
        group = dist.new_group([0, 2])
        arguments = seen_in(lambda: dist.broadcast(torch.ones(1), 0, group=group))["c10d::broadcast_"]
        assert dist.get_process_group_ranks(group_of(arguments)) == [0, 2]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("operation", ["broadcast_", "send", "recv_", "alltoall_base_"])
@contract("PyTorch's c10d::{operation} has other arguments: dry_run/symbolic_rank.py reads them by position")
def test_contract_arguments_of_a_collective(operation):
    from megatron_eagle.compat.torch_dispatch import COLLECTIVES

    names = [str(argument.name) for argument in getattr(torch.ops.c10d, operation).default._schema.arguments]
    assert tuple(names[: len(COLLECTIVES[operation])]) == COLLECTIVES[operation]
