"""PixelShuffle, concatenation and LayerNorm as Triton kernels with their gradients.

In eager PyTorch the input of Eagle 2's connector is written three times: shuffled, concatenated, normalised. All three
are the same walk over memory, so here every element is read once and written once, forward and backward. One program
makes a few whole output tokens; channel counts are compile-time constants, so that loads of 16 bytes are found wherever
the sizes allow them, and odd ones are masked. Inputs may be transposed views ([tokens, n, c] seen as [n, tokens, c],
what a Megatron encoder returns) and their gradients are laid out like them; other layouts are copied first.

Gradients of LayerNorm's weight and bias are summed per program and then over programs, in a fixed order: the same input
gives the same bits on the same GPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

COPY_BLOCK = 2048  # elements in flight per program when nothing is normalised
NORM_BLOCK = 4096  # the same for short rows when they are; a long row is held whole
FORWARD_ELEMENTS = 32  # of a token per thread
BACKWARD_ELEMENTS = 16  # fewer, because two running sums per channel are held as well
MAX_WIDTH = 8_192  # channels of an output token that LayerNorm can hold in the registers of one program
INTERPRETED_PROGRAMS = 3  # partial sums on the CPU: more than one, so that tests see the second stage


@triton.jit
def _siglip_offset(token, position, rows, columns, tile_stride, token_stride, C1: tl.constexpr):
    """Where channel ``position`` < 4*C1 of output ``token`` stands in SigLIP's tokens."""
    squares = (rows // 2) * (columns // 2)
    square = token % squares
    first = 2 * (square // (columns // 2)) * columns + 2 * (square % (columns // 2))
    quadrant = position // C1
    step = (quadrant // 2) * columns + quadrant % 2
    tile = (token // squares).to(tl.int64) * tile_stride
    return tile + first.to(tl.int64) * token_stride + step.to(tl.int64) * token_stride + position % C1


@triton.jit
def _convnext_offset(token, position, rows, columns, tile_stride, token_stride, C1: tl.constexpr):
    """Where channel ``position`` >= 4*C1 of output ``token`` stands in ConvNeXt's tokens."""
    squares = (rows // 2) * (columns // 2)
    tile = (token // squares).to(tl.int64) * tile_stride
    return tile + (token % squares).to(tl.int64) * token_stride + position - 4 * C1


@triton.jit
def _load_joined(
    siglip, convnext, token, position, tokens, rows, columns, s_tile, s_token, c_tile, c_token, C1: tl.constexpr, C2:
    tl.constexpr
):  # fmt: skip
    """The block [token, position] of the joined tensor; zero outside."""
    inside = token < tokens
    offset = _siglip_offset(token, position, rows, columns, s_tile, s_token, C1)
    joined = tl.load(siglip + offset, mask=inside & (position < 4 * C1), other=0.0)
    if C2 > 0:
        offset = _convnext_offset(token, position, rows, columns, c_tile, c_token, C1)
        mask = inside & (position >= 4 * C1) & (position < 4 * C1 + C2)
        joined = tl.where(position < 4 * C1, joined, tl.load(convnext + offset, mask=mask, other=0.0))
    return joined


@triton.jit
def _store_split(
    value, siglip, convnext, token, position, tokens, rows, columns, s_tile, s_token, c_tile, c_token,
    C1: tl.constexpr, C2: tl.constexpr, TO_SIGLIP: tl.constexpr, TO_CONVNEXT: tl.constexpr
):  # fmt: skip
    """The way back of ``_load_joined``, for those of the two inputs that need it."""
    inside = token < tokens
    if TO_SIGLIP:
        offset = _siglip_offset(token, position, rows, columns, s_tile, s_token, C1)
        tl.store(siglip + offset, value, mask=inside & (position < 4 * C1))
    if TO_CONVNEXT:
        offset = _convnext_offset(token, position, rows, columns, c_tile, c_token, C1)
        tl.store(convnext + offset, value, mask=inside & (position >= 4 * C1) & (position < 4 * C1 + C2))


@triton.jit
def join_kernel(
    siglip, convnext, out, tokens, rows, columns, s_tile, s_token, c_tile, c_token,
    C1: tl.constexpr, C2: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Forward without LayerNorm: a copy, TOKENS output tokens per program, BLOCK channels at a time."""
    WIDTH: tl.constexpr = 4 * C1 + C2
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    for start in tl.static_range(0, WIDTH, BLOCK):
        position = start + tl.arange(0, BLOCK)[None, :]
        joined = _load_joined(
            siglip, convnext, token, position, tokens, rows, columns, s_tile, s_token, c_tile, c_token, C1, C2
        )
        tl.store(out + token.to(tl.int64) * WIDTH + position, joined, mask=(token < tokens) & (position < WIDTH))


@triton.jit
def split_kernel(
    d_out, d_siglip, d_convnext, tokens, rows, columns, s_tile, s_token, c_tile, c_token,
    C1: tl.constexpr, C2: tl.constexpr, TO_SIGLIP: tl.constexpr, TO_CONVNEXT: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Backward without LayerNorm: the same copy the other way round."""
    WIDTH: tl.constexpr = 4 * C1 + C2
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    for start in tl.static_range(0, WIDTH, BLOCK):
        position = start + tl.arange(0, BLOCK)[None, :]
        value = tl.load(
            d_out + token.to(tl.int64) * WIDTH + position, mask=(token < tokens) & (position < WIDTH), other=0.0
        )
        _store_split(
            value, d_siglip, d_convnext, token, position, tokens, rows, columns, s_tile, s_token, c_tile, c_token,
            C1, C2, TO_SIGLIP, TO_CONVNEXT
        )  # fmt: skip


@triton.jit
def join_norm_kernel(
    siglip, convnext, weight, bias, out, mean, rstd, tokens, eps, rows, columns, s_tile, s_token, c_tile, c_token,
    C1: tl.constexpr, C2: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Forward with LayerNorm: whole tokens in registers, mean first and then the spread around it (no cancellation)."""
    WIDTH: tl.constexpr = 4 * C1 + C2
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    position = tl.arange(0, BLOCK)[None, :]
    joined = _load_joined(
        siglip, convnext, token, position, tokens, rows, columns, s_tile, s_token, c_tile, c_token, C1, C2
    ).to(tl.float32)
    average = tl.sum(joined, 1, keep_dims=True) / WIDTH
    centred = tl.where(position < WIDTH, joined - average, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / WIDTH + eps)
    scale = tl.load(weight + position, mask=position < WIDTH, other=0.0).to(tl.float32)
    shift = tl.load(bias + position, mask=position < WIDTH, other=0.0).to(tl.float32)
    normed = (centred * inverse * scale + shift).to(out.dtype.element_ty)
    tl.store(out + token.to(tl.int64) * WIDTH + position, normed, mask=(token < tokens) & (position < WIDTH))
    tl.store(mean + token, average, mask=token < tokens)
    tl.store(rstd + token, inverse, mask=token < tokens)


@triton.jit
def split_norm_kernel(
    d_out, siglip, convnext, weight, mean, rstd, d_siglip, d_convnext, d_weight, d_bias, tokens,
    rows, columns, s_tile, s_token, c_tile, c_token,
    C1: tl.constexpr, C2: tl.constexpr, TO_SIGLIP: tl.constexpr, TO_CONVNEXT: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Backward with LayerNorm. Programs stride over the tokens and each writes one row of the sums for weight and bias.

    With z the normalised input and g = d_out * weight:  d_input = rstd * (g - mean(g) - z * mean(g * z)).
    """
    WIDTH: tl.constexpr = 4 * C1 + C2
    program = tl.program_id(0)
    position = tl.arange(0, BLOCK)[None, :]
    scale = tl.load(weight + position, mask=position < WIDTH, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([1, BLOCK], tl.float32)
    sum_bias = tl.zeros([1, BLOCK], tl.float32)
    for group in tl.range(program, tl.cdiv(tokens, TOKENS), tl.num_programs(0), num_stages=2):
        token = (group * TOKENS + tl.arange(0, TOKENS))[:, None]
        inside = (token < tokens) & (position < WIDTH)
        joined = _load_joined(
            siglip, convnext, token, position, tokens, rows, columns, s_tile, s_token, c_tile, c_token, C1, C2
        ).to(tl.float32)
        gradient = tl.load(d_out + token.to(tl.int64) * WIDTH + position, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + token, mask=token < tokens, other=0.0)
        average = tl.load(mean + token, mask=token < tokens, other=0.0)
        normed = (joined - average) * inverse  # beyond WIDTH the gradient is zero
        sum_weight += tl.sum(gradient * normed, 0, keep_dims=True)
        sum_bias += tl.sum(gradient, 0, keep_dims=True)
        if TO_SIGLIP or TO_CONVNEXT:
            scaled = gradient * scale
            along = tl.sum(scaled * normed, 1, keep_dims=True) / WIDTH
            d_joined = inverse * (scaled - tl.sum(scaled, 1, keep_dims=True) / WIDTH - normed * along)
            _store_split(
                d_joined.to(d_out.dtype.element_ty), d_siglip, d_convnext, token, position, tokens, rows, columns,
                s_tile, s_token, c_tile, c_token, C1, C2, TO_SIGLIP, TO_CONVNEXT
            )  # fmt: skip
    tl.store(d_weight + program * WIDTH + position, sum_weight, mask=position < WIDTH)
    tl.store(d_bias + program * WIDTH + position, sum_bias, mask=position < WIDTH)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call; ``tokens`` counts output tokens, ``c2`` is 0 without ConvNeXt."""

    tokens: int
    rows: int
    columns: int
    c1: int
    c2: int

    @property
    def width(self) -> int:
        return 4 * self.c1 + self.c2

    def arguments(self) -> dict[str, int]:
        return {"tokens": self.tokens, "rows": self.rows, "columns": self.columns, "C1": self.c1, "C2": self.c2}


def copy_tiling(width: int) -> dict[str, int]:
    """Tokens and channels per step of the kernels without LayerNorm: narrow tokens share a program."""
    block = min(COPY_BLOCK, triton.next_power_of_2(width))
    return {"TOKENS": COPY_BLOCK // block, "BLOCK": block, "num_warps": 4}


def norm_tiling(width: int, elements_per_thread: int) -> dict[str, int]:
    """The same with LayerNorm, where a program needs the whole token; more warps for more registers."""
    block = triton.next_power_of_2(width)
    tokens = max(1, NORM_BLOCK // block)
    return {"TOKENS": tokens, "BLOCK": block, "num_warps": min(16, block * tokens // (32 * elements_per_thread))}


class Join(torch.autograd.Function):
    """Without LayerNorm: the backward needs no values, only where the gradients go."""

    @staticmethod
    def forward(ctx: Any, siglip: Tensor, convnext: Tensor | None, sizes: Sizes) -> Tensor:
        out = siglip.new_empty(sizes.tokens, sizes.width)
        if sizes.tokens:
            tiling = copy_tiling(sizes.width)
            join_kernel[(triton.cdiv(sizes.tokens, tiling["TOKENS"]),)](
                siglip, convnext, out, **sizes.arguments(), **_strides("s", siglip), **_strides("c", convnext), **tiling
            )
        ctx.sizes, ctx.layouts = sizes, [None if t is None else (t.shape, t.stride()) for t in (siglip, convnext)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        sizes = ctx.sizes
        d_siglip, d_convnext = _gradients(ctx, d_out)
        if sizes.tokens:
            tiling = copy_tiling(sizes.width)
            split_kernel[(triton.cdiv(sizes.tokens, tiling["TOKENS"]),)](
                d_out.contiguous(), d_siglip, d_convnext, **sizes.arguments(),
                **_strides("s", d_siglip), **_strides("c", d_convnext),
                TO_SIGLIP=d_siglip is not None, TO_CONVNEXT=d_convnext is not None, **tiling
            )  # fmt: skip
        return d_siglip, d_convnext, None


class JoinNorm(torch.autograd.Function):
    """With LayerNorm: keeps the inputs and two numbers per token, not the normalised tensor."""

    @staticmethod
    def forward(
        ctx: Any, siglip: Tensor, convnext: Tensor | None, weight: Tensor, bias: Tensor, eps: float, sizes: Sizes
    ) -> Tensor:
        out = siglip.new_empty(sizes.tokens, sizes.width)
        mean, rstd = (siglip.new_empty(sizes.tokens, dtype=torch.float32) for _ in range(2))
        if sizes.tokens:
            tiling = norm_tiling(sizes.width, FORWARD_ELEMENTS)
            join_norm_kernel[(triton.cdiv(sizes.tokens, tiling["TOKENS"]),)](
                siglip, convnext, weight, bias, out, mean, rstd, eps=eps,
                **sizes.arguments(), **_strides("s", siglip), **_strides("c", convnext), **tiling
            )  # fmt: skip
        ctx.sizes, ctx.layouts = sizes, [None if t is None else (t.shape, t.stride()) for t in (siglip, convnext)]
        ctx.save_for_backward(siglip, convnext, weight, bias, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, None, None]:
        siglip, convnext, weight, bias, mean, rstd = ctx.saved_tensors
        sizes = ctx.sizes
        d_siglip, d_convnext = _gradients(ctx, d_out)
        tiling = norm_tiling(sizes.width, BACKWARD_ELEMENTS)
        programs = min(triton.cdiv(sizes.tokens, tiling["TOKENS"]), _programs(d_out.device))
        d_weight, d_bias = d_out.new_empty(2, programs, sizes.width, dtype=torch.float32)
        if sizes.tokens:
            split_norm_kernel[(programs,)](
                d_out.contiguous(), siglip, convnext, weight, mean, rstd, d_siglip, d_convnext, d_weight, d_bias,
                **sizes.arguments(), **_strides("s", siglip), **_strides("c", convnext),
                TO_SIGLIP=d_siglip is not None, TO_CONVNEXT=d_convnext is not None, **tiling
            )  # fmt: skip
        return d_siglip, d_convnext, d_weight.sum(0).to(weight.dtype), d_bias.sum(0).to(bias.dtype), None, None


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it has no gaps and goes tile by tile or token by token; else a contiguous copy."""
    return tensor if tensor.is_contiguous() or tensor.transpose(0, 1).is_contiguous() else tensor.contiguous()


def _strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    tile, token = (0, 0) if tensor is None else tensor.stride()[:2]
    return {f"{name}_tile": tile, f"{name}_token": token}


def _gradients(ctx: Any, d_out: Tensor) -> list[Tensor | None]:
    """Memory for the gradients of SigLIP's and ConvNeXt's tokens, laid out as these are; None where none is wanted."""
    wanted = zip(ctx.layouts, ctx.needs_input_grad, strict=False)
    return [d_out.new_empty_strided(*layout) if layout and want else None for layout, want in wanted]


def _programs(device: torch.device) -> int:
    """How many partial sums of weight and bias gradients: as many programs as run at the same time."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count
