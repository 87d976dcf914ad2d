"""Packed attention in plain PyTorch: the whole score matrix and an explicit mask, in any floating dtype.

This is what the Triton kernels are held to, in float64. It needs [heads, queries, keys] memory.
"""

import torch
from torch import Tensor


def visible(cu_seqlens: Tensor, positions: Tensor, keys: int, causal: bool) -> Tensor:
    """bool [queries, keys]: key j and the query at position p are in one segment, and j <= p if causal."""
    key_positions = torch.arange(keys, device=positions.device)
    borders = cu_seqlens.to(torch.int64)
    segment_of_query = torch.searchsorted(borders, positions.to(torch.int64), right=True)
    segment_of_key = torch.searchsorted(borders, key_positions, right=True)
    in_a_segment = (segment_of_key > 0) & (segment_of_key < len(borders))
    seen = (segment_of_query[:, None] == segment_of_key[None, :]) & in_a_segment[None, :]
    if causal:
        seen &= key_positions[None, :] <= positions[:, None]
    return seen


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    query_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output [queries, heads, d], log-sum-exp of the scaled scores [heads, queries]); arguments as for the kernel.

    A query that sees no key gets output 0 and log-sum-exp -inf.
    """
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    positions = torch.arange(len(query), device=query.device) if query_positions is None else query_positions
    seen = visible(cu_seqlens, positions, len(key), causal)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    log_sum_exp = torch.logsumexp(scores, dim=-1)
    floor = log_sum_exp.masked_fill(~seen.any(dim=-1), 0.0)  # exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN
    probability = torch.exp(scores - floor[..., None])
    return torch.einsum("hqk,khd->qhd", probability, value), log_sum_exp
