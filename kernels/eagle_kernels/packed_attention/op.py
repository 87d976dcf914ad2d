"""Packed attention as an autograd function: checks, block choice and launches around ``kernels``.

Forward is one launch, backward two: dQ first, which also leaves delta = sum(output * d output) - d log_sum_exp per row,
then dK and dV. Kept for backward are the inputs, the output and the log-sum-exp; nothing of size queries x keys exists
anywhere.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from eagle_kernels.device import require_device
from eagle_kernels.packed_attention import kernels
from eagle_kernels.packed_attention.blocks import AttentionBlocks, choose_blocks, padded_head_dim

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROGRAMS_PER_PROCESSOR = 4  # with fewer, the longest dK/dV program decides how long the launch takes
INTERPRETED_CAPABILITY = (8, 0)  # the interpreter has none; with any block shapes it computes the same


@dataclass(frozen=True)
class Settings:
    """What forward and backward must agree on."""

    causal: bool
    softmax_scale: float
    blocks: AttentionBlocks


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    softmax_scale: float | None,
    query_positions: Tensor | None,
    blocks: AttentionBlocks | None,
) -> tuple[Tensor, Tensor]:
    """Checks the arguments and runs the autograd function: (output, log-sum-exp)."""
    _check(query, key, value, cu_seqlens, query_positions)
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"softmax_scale must be positive and finite, got {scale}")
    if blocks is None:
        capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else INTERPRETED_CAPABILITY
        blocks = choose_blocks(query.shape[-1], query.element_size(), capability, query_positions is not None)
    settings = Settings(causal, scale, blocks)
    output, log_sum_exp = PackedAttentionFunction.apply(query, key, value, cu_seqlens, query_positions, settings)
    return output, log_sum_exp


class PackedAttentionFunction(torch.autograd.Function):
    """(query, key, value, cu_seqlens, query_positions, settings) -> (output, log-sum-exp); both results have
    gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        query_positions: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        log_sum_exp = torch.empty(query.shape[1::-1], dtype=torch.float32, device=query.device)
        heads, block = query.shape[1], settings.blocks.forward
        grid = (triton.cdiv(len(query), block.queries) * heads,)
        if grid[0]:
            with torch.cuda.device_of(query):
                kernels.attention_forward[grid](
                    query, key, value, output, log_sum_exp, cu_seqlens, query_positions,
                    len(cu_seqlens) - 1, len(query), len(key), heads, heads // key.shape[1], settings.softmax_scale,
                    *_strides(query, key, value, output), **_constants(query, query_positions, settings.causal),
                    BLOCK_Q=block.queries, BLOCK_K=block.keys, num_warps=block.warps, num_stages=block.stages,
                )  # fmt: skip
        ctx.save_for_backward(query, key, value, output, log_sum_exp, cu_seqlens, query_positions)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return output, log_sum_exp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor | None, lse_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum_exp, cu_seqlens, query_positions = ctx.saved_tensors
        if output_gradient is None and lse_gradient is None:
            return (None,) * 6
        output_gradient = torch.zeros_like(output) if output_gradient is None else output_gradient.contiguous()
        lse_gradient = None if lse_gradient is None else lse_gradient.contiguous()
        delta = torch.empty_like(log_sum_exp)
        query_gradient = torch.empty_like(output)
        heads, group = query.shape[1], query.shape[1] // key.shape[1]
        sizes = (len(cu_seqlens) - 1, len(query), len(key))
        strides = _strides(query, key, value, output)
        constants = _constants(query, query_positions, ctx.settings.causal)
        scale, block = ctx.settings.softmax_scale, ctx.settings.blocks.query_gradient
        grid = (triton.cdiv(len(query), block.queries) * heads,)
        with torch.cuda.device_of(query):
            if grid[0]:
                kernels.attention_query_gradient[grid](
                    query, key, value, output, output_gradient, log_sum_exp, lse_gradient, delta,
                    query_gradient, cu_seqlens, query_positions, *sizes, heads, group, scale, *strides, **constants,
                    HAS_LSE_GRADIENT=lse_gradient is not None, BLOCK_Q=block.queries, BLOCK_K=block.keys,
                    num_warps=block.warps, num_stages=block.stages,
                )  # fmt: skip
            block = ctx.settings.blocks.key_gradients
            programs = triton.cdiv(len(key), block.keys) * key.shape[1]
            splits = _splits(programs, group, query.device)
            partial = (splits, *key.shape)
            dtype = key.dtype if splits == 1 else torch.float32
            key_gradient = torch.empty(partial, dtype=dtype, device=key.device)
            value_gradient = torch.empty(partial, dtype=dtype, device=key.device)
            if programs:
                kernels.attention_key_gradients[(programs * splits,)](
                    query, key, value, output_gradient, log_sum_exp, delta, key_gradient, value_gradient, cu_seqlens,
                    query_positions, *sizes, key.shape[1], group, splits, scale, *strides, **constants,
                    BLOCK_Q=block.queries, BLOCK_K=block.keys, num_warps=block.warps, num_stages=block.stages,
                )  # fmt: skip
        return query_gradient, _joined(key_gradient, key), _joined(value_gradient, value), None, None, None


def _splits(programs: int, group: int, device: torch.device) -> int:
    """Programs that share the ``group`` query heads of one key head in dK and dV: enough to fill the GPU, no more.

    Each split costs a float32 copy of dK and dV, so one is best where there are key blocks enough. On the CPU, two: the
    interpreter then runs what a GPU runs under tensor parallelism, where few key heads are left.
    """
    if device.type == "cpu":
        return min(group, 2)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(group, processors * PROGRAMS_PER_PROCESSOR // max(programs, 1)))


def _joined(partial: Tensor, like: Tensor) -> Tensor:
    return partial[0] if len(partial) == 1 else partial.sum(0).to(like.dtype)


def _strides(query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> tuple[int, ...]:
    """Between rows, then between heads."""
    return tuple(tensor.stride(axis) for axis in (0, 1) for tensor in (query, key, value, output))


def _constants(query: Tensor, query_positions: Tensor | None, causal: bool) -> dict[str, Any]:
    return {
        "CAUSAL": causal,
        "HAS_POSITIONS": query_positions is not None,
        "PRECISION": "ieee" if query.dtype is torch.float32 else "tf32",  # float32 as it stands; no meaning for 16 bits
        "HEAD_DIM": query.shape[2],
        "BLOCK_D": padded_head_dim(query.shape[2]),
    }


def _check(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, query_positions: Tensor | None) -> None:
    """ValueError on shapes and dtypes that do not fit; the values of ``cu_seqlens`` are not read, that would stall the
    GPU.
    """
    tensors = [query, key, value, cu_seqlens] + ([] if query_positions is None else [query_positions])
    require_device("packed_attention", *tensors)
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if query.ndim != 3 or key.ndim != 3 or key.shape != value.shape or query.shape[2] != key.shape[2]:
        raise ValueError(f"wanted query [queries, heads, d], key and value [keys, groups, d], got {shapes}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads cannot share {key.shape[1]} key heads evenly")
    dtypes = (query.dtype, key.dtype, value.dtype)
    if query.dtype not in DTYPES or len(set(dtypes)) > 1:
        raise ValueError(f"query, key and value must be all bfloat16, float16 or float32, got {dtypes}")
    _check_integers("cu_seqlens", "[segments + 1]", cu_seqlens, cu_seqlens.ndim == 1 and len(cu_seqlens) > 0)
    if query_positions is not None:
        _check_integers("query_positions", f"[{len(query)}]", query_positions, query_positions.shape == query.shape[:1])
    elif len(query) != len(key):
        raise ValueError(f"{len(query)} queries, {len(key)} keys: without query_positions, query i is at position i")


def _check_integers(name: str, shape: str, tensor: Tensor, fits: bool) -> None:
    if not fits or tensor.dtype != torch.int32 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous int32 {shape}, got {tensor.dtype} {list(tensor.shape)}")
