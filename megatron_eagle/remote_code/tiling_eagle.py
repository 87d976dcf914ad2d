# Copyright 2026 the megatron-eagle authors. Licensed under the Apache License, Version 2.0.
"""From an image to its grid of tiles: which grid, how many tiles, and the pixels.

The trainer cuts its tiles with these very functions, and a copy of this file is part of every exported folder.

An image is stretched (never padded) to ``columns x rows`` tiles of ``tile_size`` pixels and cut row by row; if that is
more than one tile, the whole image stretched to a single tile, the thumbnail, comes last. Two rules choose the grid:

``area``   Image Area Preservation (Eagle 2.5, arXiv 2504.15271, section 3.2.1): the best product of kept area, which
           counts up to 60 %, and aspect fidelity. All code that NVIDIA released has it, Eagle 2's included.
``ratio``  nearest aspect ratio; a tie goes to the larger grid if the image fills at least half of it (InternVL 1.5,
           arXiv 2404.16821, which the paper of Eagle 2, arXiv 2501.14818, names).

Everything here is a pure function of its arguments, so lengths can be known long before pixels are decoded.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]
ENOUGH_AREA = 0.6
RULES = ("ratio", "area")


class TilingSettings(Protocol):
    """tile_size: side of a tile, pixels. min_tiles, max_tiles: bounds on columns x rows, without the thumbnail."""

    @property
    def tile_size(self) -> int: ...

    @property
    def min_tiles(self) -> int: ...

    @property
    def max_tiles(self) -> int: ...

    @property
    def rule(self) -> str: ...


@dataclass(frozen=True)
class Tiling:
    """``TilingSettings`` of an exported folder; a recipe has its own."""

    tile_size: int
    min_tiles: int
    max_tiles: int
    rule: str

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"tiling rule {self.rule!r} is none of {', '.join(RULES)}")
        if not 1 <= self.min_tiles <= self.max_tiles or self.tile_size < 1:
            raise ValueError(f"{self.min_tiles} to {self.max_tiles} tiles of {self.tile_size} pixels cannot be cut")


@lru_cache
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """Every (columns, rows) with ``min_tiles <= columns * rows <= max_tiles``, fewest tiles first."""
    side = range(1, max_tiles + 1)
    grids = [(i, j) for i in side for j in side if min_tiles <= i * j <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, tiling: TilingSettings) -> Grid:
    """The (columns, rows) for an image of ``width x height`` pixels."""
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels has no grid")
    grids = candidate_grids(tiling.min_tiles, tiling.max_tiles)
    choose = _nearest_aspect if tiling.rule == "ratio" else _preserve_area
    return choose(width, height, tiling.tile_size, grids)


def _nearest_aspect(width: int, height: int, tile_size: int, grids: tuple[Grid, ...]) -> Grid:
    """Least |W/H - columns/rows|; an exact tie moves on to the later (larger) grid while the image fills half of it."""
    best, best_difference = grids[0], float("inf")
    for columns, rows in grids:
        difference = abs(width / height - columns / rows)
        fills_half = width * height > 0.5 * tile_size * tile_size * columns * rows
        if difference < best_difference or (difference == best_difference and fills_half):
            best, best_difference = (columns, rows), difference
    return best


def _preserve_area(width: int, height: int, tile_size: int, grids: tuple[Grid, ...]) -> Grid:
    """Greatest min(kept area, 0.6) x aspect fidelity; the first, smallest, grid wins a tie."""
    best, best_score = grids[0], 0.0
    ratio = width / height
    for columns, rows in grids:
        kept = columns * rows * tile_size * tile_size / (width * height)
        target = columns / rows
        score = min(kept, ENOUGH_AREA) * min(target / ratio, ratio / target)
        if score > best_score:
            best, best_score = (columns, rows), score
    return best


def tiles_of(grid: Grid) -> int:
    """Tiles of a grid, thumbnail included."""
    columns, rows = grid
    return columns * rows + (1 if columns * rows > 1 else 0)


def count_tiles(width: int, height: int, tiling: TilingSettings) -> int:
    """Tiles of an image of ``width x height`` pixels, thumbnail included."""
    return tiles_of(choose_grid(width, height, tiling))


def cut_tiles(image: Image.Image | NDArray[np.uint8], tiling: TilingSettings, grid: Grid | None = None) -> Tensor:
    """The tiles of an RGB image: uint8 [n, 3, s, s], row by row, thumbnail last.

    image: of Pillow, or its pixels [H, W, 3]. grid: instead of the one that the rule chooses.
    Resizing is bicubic with antialiasing in 8-bit arithmetic, within 4 of 255 of Pillow's, and about twice as fast.
    """
    pixels = _pixels(image)
    columns, rows = grid or choose_grid(pixels.shape[3], pixels.shape[2], tiling)
    size = tiling.tile_size
    cells = columns * rows
    tiles = np.empty((tiles_of((columns, rows)), 3, size, size), dtype=np.uint8)
    stretched = _resize(pixels, rows * size, columns * size)[0].permute(1, 2, 0).numpy()
    cells_of = stretched.reshape(rows, size, columns, size, 3)
    # Plane by plane from colours that lie beside each other: NumPy takes three quarters of PyTorch's time for it.
    tiles[:cells].reshape(rows, columns, 3, size, size)[...] = cells_of.transpose(0, 2, 4, 1, 3)
    if cells > 1:
        tiles[cells] = _resize(pixels, size, size)[0].numpy()
    return torch.from_numpy(tiles)


def _pixels(image: Image.Image | NDArray[np.uint8]) -> Tensor:
    """uint8 [1, 3, H, W] in channels-last order, which PyTorch's resize is fastest on.

    It looks at the stride of the single image, too: where that is not H * W * 3, it makes planes of its result, slowly.
    """
    if isinstance(image, Image.Image) and image.mode != "RGB":
        raise ValueError(f"tiles are cut from RGB images, this one is {image.mode}")
    with warnings.catch_warnings():
        # The array shares Pillow's bytes and cannot be written to; nothing here does.
        warnings.simplefilter("ignore")
        return torch.from_numpy(np.asarray(image)).unsqueeze(0).permute(0, 3, 1, 2)


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 [1, 3, H, W] -> uint8 [1, 3, height, width]."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
