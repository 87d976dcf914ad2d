"""Tiling: published sizes, a brute-force oracle, and Pillow's pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_eagle.config.reading import ReadingSettings, Tiling
from megatron_eagle.data.media.tile_counts import count_tiles_of
from megatron_eagle.data.media.tiling import candidate_grids, choose_grid, count_tiles, cut_tiles

# (width, height): grid by ratio at 448, area at 448, ratio at 512, area at 512. Computed from the released
# functions (InternVL's find_closest_aspect_ratio, NVlabs/Eagle's find_closest_aspect_ratio_v2), up to 12 tiles.
PUBLISHED = {
    (224, 224): ((1, 1), (1, 1), (1, 1), (1, 1)),
    (336, 336): ((1, 1), (1, 1), (1, 1), (1, 1)),
    (448, 448): ((1, 1), (1, 1), (1, 1), (1, 1)),
    (512, 512): ((1, 1), (1, 1), (1, 1), (1, 1)),
    (300, 900): ((1, 3), (1, 3), (1, 3), (1, 3)),
    (640, 480): ((4, 3), (4, 3), (4, 3), (4, 3)),
    (800, 1300): ((2, 3), (2, 3), (2, 3), (2, 3)),
    (1000, 400): ((5, 2), (5, 2), (5, 2), (5, 2)),
    (1024, 1024): ((3, 3), (2, 2), (2, 2), (2, 2)),
    (1280, 720): ((4, 2), (4, 2), (2, 1), (4, 2)),
    (1700, 2200): ((3, 4), (3, 4), (3, 4), (3, 4)),
    (1920, 1080): ((4, 2), (4, 2), (4, 2), (4, 2)),
    (2000, 1300): ((3, 2), (4, 3), (3, 2), (3, 2)),
    (2048, 1536): ((4, 3), (4, 3), (4, 3), (4, 3)),
    (2480, 3508): ((2, 3), (3, 4), (2, 3), (3, 4)),
    (3840, 2160): ((4, 2), (4, 3), (4, 2), (4, 3)),
    (4000, 3000): ((4, 3), (4, 3), (4, 3), (4, 3)),
    (5000, 1000): ((5, 1), (6, 2), (5, 1), (6, 2)),
}
COLUMNS = [("ratio", 448), ("area", 448), ("ratio", 512), ("area", 512)]

sizes = st.integers(1, 6000)
tilings = st.builds(
    Tiling,
    tile_size=st.sampled_from([64, 448, 512]),
    min_tiles=st.integers(1, 3),
    max_tiles=st.integers(3, 14),
    rule=st.sampled_from(["ratio", "area"]),
)


@pytest.mark.parametrize("column", range(4), ids=[f"{rule}-{size}" for rule, size in COLUMNS])
@pytest.mark.parametrize("size", PUBLISHED, ids=str)
def test_published_sizes(size, column):
    rule, tile_size = COLUMNS[column]
    tiling = Tiling(tile_size, rule=rule)
    columns, rows = PUBLISHED[size][column]
    assert choose_grid(*size, tiling) == (columns, rows)
    assert count_tiles(*size, tiling) == (columns * rows + 1 if columns * rows > 1 else 1)


def test_there_are_35_grids_of_up_to_12_tiles():
    assert len(candidate_grids(1, 12)) == 35


def oracle(width, height, tiling):
    """The rules read as a comparison of exact fractions, over all grids at once."""
    from fractions import Fraction as Fr

    side = range(1, tiling.max_tiles + 1)
    grids = [(i, j) for i in side for j in side if tiling.min_tiles <= i * j <= tiling.max_tiles]
    ratio, square = Fr(width, height), tiling.tile_size**2
    if tiling.rule == "area":

        def score(grid):
            target = Fr(*grid)
            kept = min(Fr(grid[0] * grid[1] * square, width * height), Fr(6, 10))
            return kept * min(target / ratio, ratio / target)

        best = max(map(score, grids))
        return {g for g in grids if score(g) == best}
    nearest = min(abs(ratio - Fr(*g)) for g in grids)
    tied = sorted((g for g in grids if abs(ratio - Fr(*g)) == nearest), key=lambda g: g[0] * g[1])
    filled = [g for g in tied[1:] if width * height > Fr(1, 2) * square * g[0] * g[1]]
    return {filled[-1] if filled else tied[0]}


@given(sizes, sizes, tilings)
@settings(max_examples=400, deadline=None)
def test_grid_is_the_oracles(width, height, tiling):
    allowed = oracle(width, height, tiling)
    grid = choose_grid(width, height, tiling)
    if tiling.rule == "area" and len(allowed) == 1:
        assert grid in allowed
    elif tiling.rule == "area":
        assert grid[0] * grid[1] <= max(i * j for i, j in allowed)
    else:
        # Different aspect ratios at exactly the same distance: floats may see one of them nearer.
        assert grid in allowed or abs(width / height - grid[0] / grid[1]) == pytest.approx(
            abs(width / height - min(allowed)[0] / min(allowed)[1]), abs=1e-12
        )


@given(sizes, sizes, tilings)
@settings(deadline=None)
def test_count_is_within_bounds(width, height, tiling):
    columns, rows = choose_grid(width, height, tiling)
    assert tiling.min_tiles <= columns * rows <= tiling.max_tiles
    assert count_tiles(width, height, tiling) == columns * rows + (columns * rows > 1)


@given(sizes, sizes)
@settings(deadline=None)
def test_turning_an_image_turns_its_grid_under_area(width, height):
    tiling = Tiling(448, rule="area")
    if len(oracle(width, height, tiling)) == 1:
        assert choose_grid(height, width, tiling) == choose_grid(width, height, tiling)[::-1]


def picture(width, height):
    rng = np.random.default_rng(width * 7 + height)
    coarse = rng.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("size", [(60, 60), (333, 97), (640, 480), (100, 700), (1600, 500)])
@pytest.mark.parametrize("rule", ["ratio", "area"])
def test_pixels_are_pillows(size, rule):
    tiling = Tiling(64, rule=rule)
    image = picture(*size)
    columns, rows = choose_grid(*size, tiling)
    stretched = image.resize((columns * 64, rows * 64), Image.Resampling.BICUBIC)
    boxes = [(c * 64, r * 64, c * 64 + 64, r * 64 + 64) for r in range(rows) for c in range(columns)]
    expected = [np.asarray(stretched.crop(box)) for box in boxes]
    if len(boxes) > 1:
        expected.append(np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)))

    tiles = cut_tiles(image, tiling)

    assert tiles.dtype == torch.uint8 and tiles.shape == (len(expected), 3, 64, 64) and tiles.is_contiguous()
    difference = np.abs(tiles.permute(0, 2, 3, 1).numpy().astype(int) - np.stack(expected).astype(int))
    assert difference.max() <= 2
    assert difference.mean() < 0.2


def test_image_of_one_tile_is_its_own_pixels():
    image = picture(64, 64)
    assert (cut_tiles(image, Tiling(64))[0].permute(1, 2, 0).numpy() == np.asarray(image)).all()


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="min_tiles=5 is more than max_tiles=2"):
        Tiling(448, 5, 2)
    with pytest.raises(ValueError, match="0x10"):
        choose_grid(0, 10, Tiling())
    with pytest.raises(ValueError, match="this one is L"):
        cut_tiles(Image.new("L", (8, 8)), Tiling(64))


def test_the_old_name_of_a_rule_is_refused_with_the_new_one():
    with pytest.raises(ValueError, match=r"eagle2 is now called ratio .* by the rule area"):
        ReadingSettings(tiling_rule="eagle2")


@pytest.mark.parametrize("rule", ["ratio", "area"])
def test_tiles_of_many_images_are_those_of_each(rule):
    """Drawn sizes, and those where grids tie: multiples of a tile, and halves of the area at which a tie moves on."""
    draw = np.random.default_rng(0)
    tied = [(448 * i // 2, 448 * j // 2) for i in range(1, 13) for j in range(1, 13)]
    sizes = np.concatenate([draw.integers(1, 6000, (4000, 2)), draw.integers(1, 40, (500, 2)), tied, [*PUBLISHED]])
    for min_tiles, max_tiles, side in ((1, 12, 448), (1, 24, 448), (3, 7, 512), (1, 1, 64)):
        tiling = Tiling(side, min_tiles, max_tiles, rule)
        expected = [count_tiles(width, height, tiling) for width, height in sizes.tolist()]
        assert count_tiles_of(sizes[:, 0], sizes[:, 1], tiling).tolist() == expected
    assert count_tiles_of(sizes[:0, 0], sizes[:0, 1], tiling).tolist() == []
    with pytest.raises(ValueError, match="an image of 5x0 pixels has no grid"):
        count_tiles_of(np.array([9, 5]), np.array([9, 0]), tiling)
