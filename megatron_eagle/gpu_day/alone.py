"""A run of one process, and what only CUDA can say of it."""

import gc
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_eagle.compat.platform import Platform
from megatron_eagle.parallel.groups import destroy

NO_CUDA = "needs a CUDA device"


@contextmanager
def alone(platform: Platform) -> Iterator[None]:
    """This process is a whole run; what it held on the device is free afterwards."""
    device = platform.device if platform.backend == "nccl" else None
    dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        yield
    finally:
        destroy()
        gc.collect()  # models hold groups in cycles
        if platform.device.type == "cuda":
            torch.cuda.empty_cache()


def now(device: torch.device) -> float:
    """Seconds, when all that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[list[int]]:
    """The list gets the most bytes of tensors at a time inside; it stays empty on a CPU, where nobody counts them."""
    peaks: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield peaks
    if device.type == "cuda":
        peaks.append(torch.cuda.max_memory_allocated())


@contextmanager
def synchronisations(device: torch.device) -> Iterator[Counter[str] | None]:
    """How often the host waits inside for the device, by "file:line", as PyTorch's sync debug mode sees it.

    None on a CPU, where there is nothing to wait for.
    """
    if device.type != "cuda":
        yield None
        return
    seen: Counter[str] = Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield seen
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seen.update(f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message))
