"""Automatic Degrade Sampling: text whole, budget kept, more budget never gives less."""

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_eagle.config.reading import Tiling
from megatron_eagle.data.media.tiling import count_tiles
from megatron_eagle.data.sample.budget import BudgetRequest, allocate, degrade_report, outcomes, tile_caps, tiles_under
from megatron_eagle.errors import BrokenSample

COST = 256


@st.composite
def samples(draw):
    sizes = draw(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), max_size=5))
    frames = draw(st.integers(0, 60))
    return BudgetRequest(
        text_tokens=draw(st.integers(1, 4000)),
        image_sizes=tuple(sizes),
        frames=frames,
        least_frames=draw(st.integers(0, frames)),
        frame_tokens=draw(st.integers(0, 20)),
    )


tilings = st.builds(Tiling, st.just(448), st.integers(1, 2), st.integers(2, 12), st.sampled_from(["ratio", "area"]))


def naive(wanted, length, tiling):
    """The paper's two phases, by trying everything: most frames at one tile an image, then the largest cap."""
    images, per_frame = len(wanted.image_sizes), COST + wanted.frame_tokens
    fits = [
        n
        for n in range(wanted.least_frames, wanted.frames + 1)
        if wanted.text_tokens + COST * images + n * per_frame <= length
    ]
    if not fits:
        return None
    for cap in sorted({tiling.max_tiles, *(c for c in (12, 8, 6, 4, 2, 1) if c < tiling.max_tiles)}, reverse=True):
        smaller = Tiling(448, min(cap, tiling.min_tiles), cap, tiling.rule)
        tiles = tuple(count_tiles(w, h, smaller) for w, h in wanted.image_sizes)
        if wanted.text_tokens + max(fits) * per_frame + COST * sum(tiles) <= length:
            return max(fits), tiles
    raise AssertionError("one tile an image was promised")


@given(samples(), st.integers(1, 40_000), tilings)
@settings(max_examples=150, deadline=None)
def test_budget_is_the_papers_and_never_exceeded(wanted, length, tiling):
    expected = naive(wanted, length, tiling)
    if expected is None:
        with pytest.raises(BrokenSample, match="frames fit beside|each at least"):
            allocate(wanted, length, tiling, COST)
        return
    granted = allocate(wanted, length, tiling, COST)
    assert (granted.frames, granted.tiles) == expected
    per_frame = COST + wanted.frame_tokens
    assert granted.tokens == wanted.text_tokens + granted.frames * per_frame + COST * sum(granted.tiles) <= length
    assert granted.tiles == tiles_under(granted.tile_cap, wanted.image_sizes, tiling)


@given(samples(), st.integers(1, 40_000), st.integers(0, 20_000), tilings)
@settings(max_examples=150, deadline=None)
def test_more_budget_never_gives_less(wanted, length, more, tiling):
    try:
        small = allocate(wanted, length, tiling, COST)
    except BrokenSample:
        assume(False)
    large = allocate(wanted, length + more, tiling, COST)
    assert large.frames >= small.frames and all(a >= b for a, b in zip(large.tiles, small.tiles, strict=True))


def test_the_steps_down():
    assert tile_caps(Tiling()) == (12, 8, 6, 4, 2, 1) and tile_caps(Tiling(max_tiles=9)) == (9, 8, 6, 4, 2, 1)
    wanted = BudgetRequest(text_tokens=100, image_sizes=((640, 480), (640, 480)))
    caps = {length: allocate(wanted, length, Tiling(), COST).tile_cap for length in (612, 4000, 5000, 6756, 16384)}
    assert caps == {612: 4, 4000: 8, 5000: 8, 6756: 12, 16384: 12}
    with pytest.raises(ValueError, match="least_frames=3 must be between 0 and frames=2"):
        BudgetRequest(1, frames=2, least_frames=3)


def test_report_by_source():
    tiling = Tiling()
    wanted = BudgetRequest(text_tokens=100, image_sizes=((640, 480),), frames=20)
    left_out = [outcomes(wanted, allocate(wanted, length, tiling, COST), tiling) for length in (16384, 7000, 2000)]
    assert left_out == [(), ("at most 4 tiles an image",), ("at most 4 tiles an image", "fewer frames")]
    counts = Counter({"dropped": 2, "fewer frames": 1, "whole": 7, "degraded": 1})
    assert degrade_report({"slides": counts, "films": Counter(dropped=1)}) == [
        "films: 1 dropped",
        "slides: 7 whole, 1 degraded, 1 fewer frames, 2 dropped",
    ]
