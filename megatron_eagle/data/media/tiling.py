"""From an image to its tiles, in training: the exported code's own functions, so that both can only agree."""

from megatron_eagle.remote_code.tiling_eagle import (
    Grid,
    candidate_grids,
    choose_grid,
    count_tiles,
    cut_tiles,
    tiles_of,
)

__all__ = ["Grid", "candidate_grids", "choose_grid", "count_tiles", "cut_tiles", "tiles_of"]
