"""One process that believes itself among many: groups of any size with nobody at the other end.

Leaned on: ``torch.testing._internal.distributed.fake_pg``, its store and ``_create_fake_pg``, whose collectives return
at once. PyTorch keeps it for its own tests; the public backends all wait for real peers. Registered under a name of our
own, because PyTorch registers its ``fake`` for no tensors on the meta device.
"""

from typing import Any

import torch.distributed as dist

_BACKEND = "symbolic_rank"


def join_alone(rank: int, world_size: int) -> None:
    """``torch.distributed.init_process_group`` as process ``rank`` of ``world_size``, none of which exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg  # loads much of torch.testing

    if _BACKEND not in dist.Backend.backend_list:
        create: Any = _create_fake_pg
        dist.Backend.register_backend(_BACKEND, create, extended_api=True, devices=["cpu", "meta"])
    dist.init_process_group(_BACKEND, rank=rank, world_size=world_size, store=FakeStore())
