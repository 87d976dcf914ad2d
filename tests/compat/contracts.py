"""What the contract tests share: failing in words, finding a name, and Megatron's groups in a process by itself.

When a contract test fails, a library no longer does what ``compat`` leans on: the words say what, and who needs it.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_eagle.compat.fake_processes import join_alone
from megatron_eagle.compat.platform import install

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="builds Megatron's modules on a CPU")


def contract(words: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test fail with ``words``, which may name its parameters in braces, whatever goes wrong in it."""

    def of(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def checked(**arguments: Any) -> None:
            reason = None
            try:
                test(**arguments)
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if reason:  # not where it is caught, or pytest would print the cause's traceback first
                pytest.fail(f"{words.format(**arguments)} ({reason})", pytrace=False)

        return checked

    return of


def the(path: str) -> Any:
    """What stands at ``module:name.name``; ImportError or AttributeError if nothing does."""
    module, _, names = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
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
