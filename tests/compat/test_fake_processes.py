"""compat/fake_processes.py."""

import torch
import torch.distributed as dist
from contracts import contract, the

from megatron_eagle.compat.fake_processes import join_alone


@contract(
    "PyTorch's fake process group no longer takes rank and size as given, or waits for others, or refuses tensors "
    "on the meta device: dry_run/walk.py builds every process of a large job in one"
)
def test_contract_a_process_group_with_nobody_in_it():
    the("torch.testing._internal.distributed.fake_pg:_create_fake_pg")
    the("torch.testing._internal.distributed.fake_pg:FakeStore")
    join_alone(3, 512)
    try:
        weightless, real = torch.empty(8, device="meta"), torch.ones(8)
        dist.all_reduce(weightless)
        dist.all_reduce(real)
        assert (dist.get_rank(), dist.get_world_size()) == (3, 512)
        assert weightless.is_meta and real.eq(1).all()
    finally:
        dist.destroy_process_group()
