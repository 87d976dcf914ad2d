"""Flash attention for packs: several segments in one sequence, the mask made inside the kernel from their borders.

A pack needs a block-diagonal mask. Written out it has L x L elements; here each query block works out from
``cu_seqlens`` which keys its rows can see and visits no others, so a pack costs what its segments cost. Three uses, one
set of kernels:

- the language model: causal within a segment, key/value heads shared by query heads (GQA);
- SigLIP: no causality, every tile a segment (``tile_attention``);
- context parallelism: a rank holds some rows of the pack and gathers all keys; ``query_positions`` says where its rows
  are, in any order (the two chunks of a zigzag layout, say).

Forward and backward, log-sum-exp with gradient (so that partial results over keys can be joined), bfloat16, float16 and
float32 with float32 accumulation, head dimensions up to 128 (those that are no power of two are padded in registers
only). Deterministic by construction: dQ has a program per query block, dK and dV one per key block, and nothing is
added atomically.
"""

import torch
from torch import Tensor, nn

from eagle_kernels.packed_attention.blocks import AttentionBlocks, Blocks
from eagle_kernels.packed_attention.op import attend

__all__ = [
    "AttentionBlocks",
    "Blocks",
    "PackedAttention",
    "packed_attention",
    "packed_attention_with_log_sum_exp",
    "tile_attention",
]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    query_positions: Tensor | None = None,
    blocks: AttentionBlocks | None = None,
) -> Tensor:
    """softmax(query key^T * softmax_scale) value over the keys of each query's own segment -> [queries, heads, d].

    query: [queries, heads, d]. key, value: [keys, groups, d]; ``groups`` divides ``heads``, d <= 128. Views are fine as
    long as the last dimension is contiguous (slices of a fused QKV projection are).
    cu_seqlens: int32 [segments + 1], ascending borders of the segments in the order of the keys; segments may be empty.
        Its values are not checked, since reading them would stall the GPU; wrong ones give wrong results, not invalid
        reads.
    causal: a query at position p sees keys up to p; else it sees its whole segment.
    softmax_scale: positive; default 1/sqrt(d).
    query_positions: int32 [queries], each query's position among the keys; default 0, 1, ..., keys - 1. Any order is
        right, ascending is fast.
    blocks: block shapes, for measuring; by default chosen for head dimension, dtype and GPU.

    A query outside all segments sees nothing and gets 0. Raises ValueError where shapes, dtypes or strides do not fit,
    and RuntimeError on a CPU tensor unless Triton interprets its kernels.
    """
    return attend(query, key, value, cu_seqlens, causal, softmax_scale, query_positions, blocks)[0]


def packed_attention_with_log_sum_exp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    query_positions: Tensor | None = None,
    blocks: AttentionBlocks | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``packed_attention``, and the log of the softmax's denominator: float32 [heads, queries], -inf where nothing
    is seen.

    Gradients flow through both results.
    """
    return attend(query, key, value, cu_seqlens, causal, softmax_scale, query_positions, blocks)


def tile_attention(query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float | None = None) -> Tensor:
    """Full attention inside each of n tiles: [n, tokens, heads, d] (key, value: [n, tokens, groups, d]) -> as query.

    n may be 0. A view that cannot be flattened to [n * tokens, heads, d] is copied.
    """
    tiles, tokens = query.shape[:2]
    cu_seqlens = torch.arange(tiles + 1, dtype=torch.int32, device=query.device) * tokens
    q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
    return packed_attention(q, k, v, cu_seqlens, causal=False, softmax_scale=softmax_scale).view(query.shape)


class PackedAttention(nn.Module):
    """``packed_attention`` with its settings fixed, to stand where a model wants a module."""

    def __init__(self, *, causal: bool = True, softmax_scale: float | None = None) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, query_positions: Tensor | None = None
    ) -> Tensor:
        return packed_attention(
            query,
            key,
            value,
            cu_seqlens,
            causal=self.causal,
            softmax_scale=self.softmax_scale,
            query_positions=query_positions,
        )

    def extra_repr(self) -> str:
        return f"causal={self.causal}, softmax_scale={self.softmax_scale}"
