"""Block shapes of the three attention kernels, by head dimension, element size and GPU generation.

One fixed choice per case instead of autotuning: packs differ at every step, so a tuner keyed on shapes would never stop
tuning. The choices are the largest blocks that spill no registers, read off the compiled kernels (``python -m
eagle_kernels.check --tier compile``). None was timed yet: ``timing.py`` times them
against other choices on a GPU.
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


def choose_blocks(head_dim: int, element_bytes: int, capability: tuple[int, int], positions: bool) -> AttentionBlocks:
    """The blocks for heads of ``head_dim`` elements of ``element_bytes`` on a GPU of this compute capability.

    ``positions``: query positions are given explicitly, which takes a few registers more, as padding of the head does.
    Raises ValueError if head_dim > 128: dK and dV of a block would no longer fit into registers.
    """
    if not 1 <= head_dim <= 128:
        raise ValueError(f"packed_attention has head dimensions 1 to 128, got {head_dim}")
    if element_bytes == 4:
        return FLOAT32
    padded = padded_head_dim(head_dim)
    table = {9: HOPPER, 10: BLACKWELL}.get(capability[0], AMPERE)
    if padded <= 64:
        return table["narrow"]
    if positions:
        return table["positions"]
    return table["wide"] if head_dim == padded else table["padded"]


# Forward, dQ, dK and dV: query rows, keys, warps, stages. On Hopper 8 warps are two warpgroups of 64 rows each.
HOPPER = {
    "wide": AttentionBlocks(Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    "positions": AttentionBlocks(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(32, 128, 8, 2)),
    "padded": AttentionBlocks(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(32, 128, 8, 2)),
    "narrow": AttentionBlocks(Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
}
BLACKWELL = {
    "wide": AttentionBlocks(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    "positions": AttentionBlocks(Blocks(128, 32, 8, 3), Blocks(128, 32, 8, 2), Blocks(64, 128, 8, 2)),
    "padded": AttentionBlocks(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    "narrow": AttentionBlocks(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
}
# Ampere, and the smaller GPUs after it, whose programs have 99 KB of shared memory.
AMPERE = {
    "wide": AttentionBlocks(Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(64, 64, 8, 2)),
    "positions": AttentionBlocks(Blocks(64, 64, 8, 2), Blocks(64, 32, 4, 2), Blocks(64, 64, 8, 2)),
    "padded": AttentionBlocks(Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(64, 64, 8, 2)),
    "narrow": AttentionBlocks(Blocks(64, 64, 4, 2), Blocks(128, 32, 4, 2), Blocks(64, 64, 4, 2)),
}
# Full float32 products run on the ordinary cores, for tests rather than for training.
FLOAT32 = AttentionBlocks(Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(16, 32, 8, 2))
