"""From uint8 tiles to what SigLIP and ConvNeXt read, in one pass over memory."""

import torch
from torch import Tensor

from eagle_kernels.device import require_device
from eagle_kernels.tile_prepare.op import COLOURS, prepare
from eagle_kernels.tile_prepare.reference import tile_prepare_reference

__all__ = ["tile_prepare", "tile_prepare_reference"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SIZE = 32_768  # (size - 1) * (resized - 1) and a plane's pixels are counted in 32 bits
MAX_TILES = 65_535 // COLOURS  # planes are the second axis of the launch grid, CUDA's limit for it


def tile_prepare(
    tiles: Tensor, *, convnext_size: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor | None]:
    """Normalises tiles for SigLIP and, if wanted, resizes and normalises them for ConvNeXt. Not differentiable.

    Args:
        tiles: uint8 [n, 3, s, s], red, green, blue.
        convnext_size: side z of ConvNeXt's input (512 in Eagle 2), None for SigLIP alone.
        dtype: of the results: float32, float16 or bfloat16; the arithmetic is float32.

    Returns:
        SigLIP's input [n, 3, s, s], in [-1, 1]; ConvNeXt's input [n, 3, z, z] or None: bilinear with aligned corners,
        then CLIP's mean and standard deviation.

    Raises:
        ValueError: a shape, size or dtype that does not fit, with the numbers.
        RuntimeError: tiles where no kernel can run (``eagle_kernels.device``).
    """
    if tiles.dim() != 4 or tiles.shape[1] != COLOURS or tiles.shape[2] != tiles.shape[3] or tiles.dtype != torch.uint8:
        raise ValueError(f"tiles {list(tiles.shape)} {tiles.dtype} are not uint8 [n, {COLOURS}, s, s]")
    n, _, size, _ = tiles.shape
    if not 0 < max(size, convnext_size or 0) <= MAX_SIZE or (convnext_size is not None and convnext_size < 1):
        raise ValueError(f"tiles of {size} and convnext_size={convnext_size} are not between 1 and {MAX_SIZE} pixels")
    if n > MAX_TILES:
        raise ValueError(f"{n} tiles at once, the launch grid holds {MAX_TILES}: prepare them in parts")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {DTYPES}")
    require_device("tile_prepare", tiles)
    return prepare(tiles, convnext_size, dtype)
