"""What the contract tests share: finding a name of a library, and Megatron's groups in a process by itself.

A contract test says in words what a library no longer does when it fails, and who leans on it.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_eagle.compat.fake_processes import join_alone
from megatron_eagle.compat.platform import install

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="builds Megatron's modules on a CPU")


def the(path: str, words: str) -> Any:
    """What stands at ``module:name.name``; fails with ``words`` if nothing does."""
    module, _, names = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{words} ({error})", pytrace=False)
    return found


@contextmanager
def megatron_groups(world_size: int = 1, rank: int = 0, **sizes: int) -> Iterator[None]:
    """Megatron's process groups: of this process alone, or as ``rank`` of ``world_size`` that do not exist."""
    install()
    if world_size == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        join_alone(rank, world_size)
    try:
        parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=world_size == 1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
