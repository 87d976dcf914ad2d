"""Tiles of many images at once, by the rules of ``tiling.py``: a window of samples has a million sizes to count.

One at a time they would take 17 s. The arithmetic is the same, operation by operation in float64, so that the same
grids come out, ties too; tests hold the two together.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_eagle.config.reading import Tiling
from megatron_eagle.data.media.tiling import candidate_grids, tiles_of
from megatron_eagle.remote_code.tiling_eagle import ENOUGH_AREA


def count_tiles_of(widths: NDArray[np.int64], heights: NDArray[np.int64], tiling: Tiling) -> NDArray[np.int64]:
    """int64 [n]: ``tiling.count_tiles`` of images of these sides, pixels. ValueError for one without an area."""
    if len(widths) and min(widths.min(), heights.min()) < 1:
        bad = int(np.argmin(np.minimum(widths, heights)))
        raise ValueError(f"an image of {widths[bad]}x{heights[bad]} pixels has no grid")
    grids = candidate_grids(tiling.min_tiles, tiling.max_tiles)
    ratios, areas = widths / heights, widths * heights
    found = np.full(len(widths), tiles_of(grids[0]), np.int64)
    best = np.full(len(widths), np.inf if tiling.rule == "ratio" else 0.0)
    for columns, rows in grids:
        if tiling.rule == "ratio":
            score = np.abs(ratios - columns / rows)
            fills_half = areas > 0.5 * tiling.tile_size * tiling.tile_size * columns * rows
            better = (score < best) | ((score == best) & fills_half)
        else:
            kept = columns * rows * tiling.tile_size * tiling.tile_size / areas
            target = columns / rows
            score = np.minimum(kept, ENOUGH_AREA) * np.minimum(target / ratios, ratios / target)
            better = score > best
        best[better], found[better] = score[better], tiles_of((columns, rows))
    return found
