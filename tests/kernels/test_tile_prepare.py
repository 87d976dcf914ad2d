"""tile_prepare against interpolation matrices in float64, on ragged sizes; and whether these tests can fail."""

import eagle_kernels.tile_prepare as face
import pytest
import torch
from eagle_kernels.device import INTERPRETED
from eagle_kernels.tile_prepare import entry, op, tile_prepare, tile_prepare_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

interpreter = pytest.mark.interpreter
ragged = settings(max_examples=30, deadline=None, derandomize=True, database=None)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7 + 1e-6}


def raw_tiles(n: int, size: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(size), dtype=torch.uint8)


def weights(size: int, resized: int) -> Tensor:
    """[resized, size]: row r holds what output r takes from each input, corners aligned."""
    matrix = torch.zeros(resized, size, dtype=torch.float64)
    for row in range(resized):
        position = row * (size - 1) / (resized - 1) if resized > 1 else 0.0
        for column in range(size):
            matrix[row, column] = max(0.0, 1.0 - abs(position - column))
    return matrix


def convnext_by_hand(tiles: Tensor, resized: int) -> Tensor:
    matrix = weights(tiles.shape[-1], resized)
    return (matrix @ (tiles.double() / 255) @ matrix.T - MEAN) / STD


@interpreter
@ragged
@given(
    n=st.integers(0, 3),
    size=st.integers(1, 40),
    resized=st.one_of(st.none(), st.integers(1, 40)),
    dtype=st.sampled_from(list(TOLERANCE)),
    flipped=st.booleans(),
)
def test_values(n, size, resized, dtype, flipped):
    tiles = raw_tiles(n, size)
    tiles = tiles.transpose(2, 3) if flipped else tiles
    siglip, convnext = tile_prepare(tiles, convnext_size=resized, dtype=dtype)
    assert siglip.dtype is dtype
    torch.testing.assert_close(siglip.double(), (tiles.double() / 255 - 0.5) / 0.5, rtol=0, atol=TOLERANCE[dtype])
    assert (convnext is None) == (resized is None)
    if convnext is not None:
        assert convnext.dtype is dtype
        torch.testing.assert_close(convnext.double(), convnext_by_hand(tiles, resized), rtol=0, atol=TOLERANCE[dtype])


def test_reference_follows_the_order_of_the_released_code():
    """Normalised for SigLIP, resized, then mapped to CLIP's statistics, as Eagle 2's published model code does it."""
    tiles = raw_tiles(2, 28)
    _, ours = tile_prepare_reference(tiles, convnext_size=32, dtype=torch.float64)
    siglip = (tiles.double() / 255 - 0.5) / 0.5
    resized = torch.nn.functional.interpolate(siglip, size=(32, 32), mode="bilinear", align_corners=True)
    torch.testing.assert_close(ours, resized * (0.5 / STD) + (0.5 - MEAN) / STD, rtol=0, atol=1e-12)


MUTANTS = {
    "weights of rows and columns swapped": ("down = (row % STEPS)", "down = (column % STEPS)"),
    "last pixel dropped": ("inside = pixel < RESIZED * RESIZED", "inside = pixel < RESIZED * RESIZED - 1"),
    "siglip's tail dropped": ("inside = pixel < SIZE * SIZE", "inside = pixel < SIZE * (SIZE - 1)"),
    "green treated as red": ("tl.where(colour == 0, red,", "tl.where(colour <= 1, red,"),
    "corners not aligned": ("row = (pixel // RESIZED) * (SIZE - 1)", "row = (pixel // RESIZED) * SIZE"),
    "every tile is the first": (
        "source = tiles + plane.to(tl.int64) * SIZE * SIZE",
        "source = tiles + (plane % 3) * SIZE * SIZE",
    ),
}


@interpreter
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_kernel_is_seen(mutant, mutate, monkeypatch):
    monkeypatch.setattr(face, "prepare", mutate(op, *MUTANTS[mutant]).prepare)
    error = entry.worst_error(torch.device("cpu"), torch.float32, size=28, convnext_size=20)
    assert not error <= 1e-3, f"{mutant}: error {error}"


@interpreter
def test_the_right_kernel_passes_where_the_wrong_ones_fail():
    assert entry.worst_error(torch.device("cpu"), torch.float32, size=28, convnext_size=20) <= 2e-6


def test_wrong_arguments_are_named():
    tiles = raw_tiles(1, 8)
    with pytest.raises(ValueError, match="float32 are not uint8"):
        tile_prepare(tiles.float())
    with pytest.raises(ValueError, match=r"\[1, 3, 8, 6\]"):
        tile_prepare(tiles[..., :6])
    with pytest.raises(ValueError, match="convnext_size=0"):
        tile_prepare(tiles, convnext_size=0)
    with pytest.raises(ValueError, match="float64"):
        tile_prepare(tiles, dtype=torch.float64)


@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")
def test_cpu_tensors_are_refused_where_nothing_interprets():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        tile_prepare(raw_tiles(1, 8))
