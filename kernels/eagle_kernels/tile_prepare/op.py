"""Both encoders' inputs from uint8 tiles in one walk: normalised for SigLIP, resized and normalised for ConvNeXt.

In eager PyTorch the tiles become float32, are scaled, shifted, resized and cast in passes of their own, each several
times the size of the uint8 tiles. Here one program reads a stretch of a colour plane and writes the same stretch of
SigLIP's plane and, of ConvNeXt's, the stretch that lies over about the same pixels, which it thus finds in the cache:
the tiles cross the memory bus once. There is no gradient: the input is uint8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagle_kernels.tile_prepare.reference import CLIP_MEAN, CLIP_STD

BLOCK = 1024  # output pixels of each kind per program
COLOURS = 3


@triton.jit
def _of_colour(colour, red, green, blue):
    return tl.where(colour == 0, red, tl.where(colour == 1, green, blue))


@triton.jit
def prepare_kernel(
    tiles, siglip, convnext, scale_red, scale_green, scale_blue, shift_red, shift_green, shift_blue,
    SIZE: tl.constexpr, RESIZED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (block, plane): plane = 3 * tile + colour of contiguous tiles [n, 3, SIZE, SIZE]; RESIZED 0 is no
    ConvNeXt.

    With align_corners the source row of output row r is r * (SIZE - 1) / (RESIZED - 1). Its whole part and its
    remainder are integers, so the weights are exact; PyTorch rounds the position to float32 instead (differences below
    1e-4). Sizes are compile-time constants because a division by them then costs a multiplication.
    """
    plane = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tiles + plane.to(tl.int64) * SIZE * SIZE
    inside = pixel < SIZE * SIZE
    raw = tl.load(source + pixel, mask=inside, other=0).to(tl.float32)
    normed = raw * (1.0 / 127.5) - 1.0
    tl.store(siglip + plane.to(tl.int64) * SIZE * SIZE + pixel, normed.to(siglip.dtype.element_ty), mask=inside)

    if RESIZED > 0:
        inside = pixel < RESIZED * RESIZED
        STEPS: tl.constexpr = RESIZED - 1 if RESIZED > 1 else 1
        row = (pixel // RESIZED) * (SIZE - 1)
        column = (pixel % RESIZED) * (SIZE - 1)
        down = (row % STEPS).to(tl.float32) * (1.0 / STEPS)
        right = (column % STEPS).to(tl.float32) * (1.0 / STEPS)
        top = (row // STEPS) * SIZE
        left = column // STEPS
        bottom = tl.minimum(top + SIZE, (SIZE - 1) * SIZE)
        beside = tl.minimum(left + 1, SIZE - 1)
        top_left = tl.load(source + top + left, mask=inside, other=0).to(tl.float32)
        top_right = tl.load(source + top + beside, mask=inside, other=0).to(tl.float32)
        bottom_left = tl.load(source + bottom + left, mask=inside, other=0).to(tl.float32)
        bottom_right = tl.load(source + bottom + beside, mask=inside, other=0).to(tl.float32)
        above = top_left + (top_right - top_left) * right
        below = bottom_left + (bottom_right - bottom_left) * right
        scale = _of_colour(plane % 3, scale_red, scale_green, scale_blue)
        shift = _of_colour(plane % 3, shift_red, shift_green, shift_blue)
        value = (above + (below - above) * down) * scale + shift
        destination = convnext + plane.to(tl.int64) * RESIZED * RESIZED
        tl.store(destination + pixel, value.to(convnext.dtype.element_ty), mask=inside)


def prepare(tiles: Tensor, convnext_size: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Allocates and launches; arguments as checked by ``tile_prepare``."""
    n, _, size, _ = tiles.shape
    resized = convnext_size or 0
    siglip = torch.empty_like(tiles, dtype=dtype, memory_format=torch.contiguous_format)
    convnext = siglip.new_empty(n, COLOURS, resized, resized) if convnext_size else None
    if n:
        blocks = triton.cdiv(max(size, resized) ** 2, BLOCK)
        scales = [1.0 / (255.0 * std) for std in CLIP_STD]
        shifts = [-mean / std for mean, std in zip(CLIP_MEAN, CLIP_STD, strict=True)]
        prepare_kernel[(blocks, n * COLOURS)](
            tiles.contiguous(), siglip, convnext, *scales, *shifts,
            SIZE=size, RESIZED=resized, BLOCK=BLOCK, num_warps=4
        )  # fmt: skip
    return siglip, convnext
