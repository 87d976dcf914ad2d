"""pixel_shuffle_concat against token-by-token loops in float64, on ragged shapes; and whether these tests can fail."""

from unittest.mock import patch

import eagle_kernels.pixel_shuffle_concat as face
import pytest
import torch
from eagle_kernels.device import INTERPRETED
from eagle_kernels.pixel_shuffle_concat import entry, op, pixel_shuffle_concat, pixel_shuffle_concat_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

interpreter = pytest.mark.interpreter
ragged = settings(max_examples=25, deadline=None, derandomize=True, database=None)
HALF_STEP = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}


def joined_by_hand(siglip: Tensor, convnext: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Output token (R, C) of a tile: tokens (2R, 2C), (2R, 2C+1), (2R+1, 2C), (2R+1, 2C+1), then ConvNeXt's (R, C)."""
    rows, columns = grid
    out = []
    for tile in range(siglip.shape[0]):
        for row in range(0, rows, 2):
            for column in range(0, columns, 2):
                parts = [siglip[tile, (row + i) * columns + column + j] for i in (0, 1) for j in (0, 1)]
                if convnext is not None:
                    parts.append(convnext[tile, (row // 2) * (columns // 2) + column // 2])
                out.append(torch.cat(parts))
    return torch.stack(out)


def normed_by_hand(joined: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = joined - joined.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(n: int, count: int, channels: int, layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    if layout == "token by token":
        return draw(count, n, channels, dtype=dtype, seed=seed).transpose(0, 1)
    if layout == "gaps":
        return draw(n, count, channels + 3, dtype=dtype, seed=seed)[..., 1:-2]
    return draw(n, count, channels, dtype=dtype, seed=seed)


@interpreter
@ragged
@given(
    n=st.integers(0, 3),
    grid=st.tuples(st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 10])),
    c1=st.integers(1, 19),
    c2=st.integers(0, 19),
    norm=st.booleans(),
    layout=st.sampled_from(["tile by tile", "token by token", "gaps"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    block=st.sampled_from([8, 64, 4096]),
)
def test_values_and_gradients(n, grid, c1, c2, norm, layout, dtype, block):
    count = grid[0] * grid[1]
    inputs = [tokens(n, count, c1, layout, dtype, 1), tokens(n, count // 4, c2, layout, dtype, 2) if c2 else None]
    inputs += [draw(4 * c1 + c2, seed=3), draw(4 * c1 + c2, seed=4)] if norm else [None, None]
    d_out = draw(n * count // 4, 4 * c1 + c2, dtype=dtype, seed=5)

    with patch.object(op, "COPY_BLOCK", block), patch.object(op, "NORM_BLOCK", block):
        ours = [None if tensor is None else tensor.requires_grad_() for tensor in inputs]
        out = pixel_shuffle_concat(ours[0], ours[1], grid=grid, weight=ours[2], bias=ours[3])
        got = [out, *torch.autograd.grad(out, [tensor for tensor in ours if tensor is not None], d_out)]

    if n == 0:  # nothing to compare but shapes, and that no tile means no gradient
        assert out.shape == d_out.shape
        assert all(not gradient.any() for gradient in got[1:])
        return
    exact = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in inputs]
    out = joined_by_hand(exact[0], exact[1], grid)
    if norm:
        out = normed_by_hand(out, exact[2], exact[3], 1e-5)
    leaves = [tensor for tensor in exact if tensor is not None]
    expected = [out, *torch.autograd.grad(out, leaves, d_out.double())]
    tolerance = 2 * HALF_STEP[dtype] if norm else 0.0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@interpreter
def test_eps_is_the_one_given():
    flat = torch.ones(1, 4, 3) + 1e-3 * draw(1, 4, 3)
    weight, bias = torch.ones(12), torch.zeros(12)
    got = pixel_shuffle_concat(flat, grid=(2, 2), weight=weight, bias=bias, eps=1e-2)
    expected = normed_by_hand(joined_by_hand(flat.double(), None, (2, 2)), weight.double(), bias.double(), 1e-2)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-6)


@interpreter
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("frozen", ["siglip", "convnext", "both"])
def test_frozen_encoders_get_no_gradient(norm, frozen):
    siglip, convnext = draw(2, 8, 5), draw(2, 2, 7, seed=1)
    trained = [name for name in ("siglip", "convnext") if frozen not in (name, "both")]
    inputs = {"siglip": siglip, "convnext": convnext}
    if norm:
        inputs |= {"weight": draw(27, seed=2), "bias": draw(27, seed=3)}
        trained += ["weight", "bias"]
    out = pixel_shuffle_concat(**{k: v.requires_grad_(k in trained) for k, v in inputs.items()}, grid=(2, 4))
    assert out.requires_grad == bool(trained)
    if not trained:
        return
    d_out = draw(4, 27, seed=4)
    got = torch.autograd.grad(out, [inputs[name] for name in trained], d_out)
    exact = {k: v.detach().double().requires_grad_(k in trained) for k, v in inputs.items()}
    reference = pixel_shuffle_concat_reference(**exact, grid=(2, 4))
    expected = torch.autograd.grad(reference, [exact[name] for name in trained], d_out.double())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@interpreter
def test_gradients_are_laid_out_as_their_inputs_and_the_same_every_time():
    siglip = draw(8, 3, 5).transpose(0, 1).requires_grad_()
    weight, bias = draw(20, seed=1).requires_grad_(), draw(20, seed=2).requires_grad_()
    runs = []
    with patch.object(op, "NORM_BLOCK", 32):
        for _ in range(2):
            out = pixel_shuffle_concat(siglip, grid=(2, 4), weight=weight, bias=bias)
            runs.append(torch.autograd.grad(out, [siglip, weight, bias], draw(6, 20, seed=3)))
    assert runs[0][0].stride() == siglip.stride()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_reference_is_the_shuffle_of_the_released_models():
    """The reshapes of InternVL's and Eagle 2's published ``pixel_shuffle``: scale 0.5, ps_version v2, square grid."""
    siglip = draw(2, 36, 5)
    x = siglip.view(2, 6, 6, 5)
    x = x.reshape(2, 6, 3, 10).permute(0, 2, 1, 3)
    x = x.reshape(2, 3, 3, 20).permute(0, 2, 1, 3)
    assert torch.equal(pixel_shuffle_concat_reference(siglip, grid=(6, 6)), x.reshape(18, 20))


MUTANTS = {
    "squares turned": (
        "step = (quadrant // 2) * columns + quadrant % 2",
        "step = (quadrant % 2) * columns + quadrant // 2",
    ),
    "every tile is the first": ("    return tile + first", "    return first"),
    "tail of the channels dropped": (
        "joined, mask=(token < tokens) & (position < WIDTH)",
        "joined, mask=(token < tokens) & (position < WIDTH - 1)",
    ),
    "gradient of convnext not written": ("    if TO_CONVNEXT:", "    if False:"),
    "mean over the padded block": (
        "tl.sum(joined, 1, keep_dims=True) / WIDTH",
        "tl.sum(joined, 1, keep_dims=True) / BLOCK",
    ),
    "padding counted into the spread": ("tl.where(position < WIDTH, joined - average, 0.0)", "joined - average"),
    "last group of tokens left out": ("tl.cdiv(tokens, TOKENS), tl.num", "tokens // TOKENS, tl.num"),
    "gradient of the mean forgotten": ("scaled - tl.sum(scaled, 1, keep_dims=True) / WIDTH", "scaled"),
}


def errors_of_both_kernels() -> list[float]:
    shape = {"grid": (2, 6), "c1": 5, "c2": 7}
    return [entry.worst_error(torch.device("cpu"), torch.float32, norm=norm, **shape) for norm in (False, True)]


@interpreter
def test_the_right_kernel_passes_where_the_wrong_ones_fail(monkeypatch):
    monkeypatch.setattr(op, "NORM_BLOCK", 128)
    assert all(error <= 2e-6 for error in errors_of_both_kernels())


@interpreter
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_kernel_is_seen(mutant, mutate, monkeypatch):
    mutated = mutate(op, *MUTANTS[mutant])
    monkeypatch.setattr(mutated, "NORM_BLOCK", 128)  # 4 tokens a program, so that the last of 6 make a partial group
    monkeypatch.setattr(face, "Join", mutated.Join)
    monkeypatch.setattr(face, "JoinNorm", mutated.JoinNorm)
    errors = errors_of_both_kernels()
    assert not all(error <= 1e-4 for error in errors), f"{mutant}: errors {errors}"


@pytest.mark.parametrize(
    ("siglip", "convnext", "grid", "said"),
    [
        ((2, 15, 4), None, (3, 5), "3 x 5"),
        ((2, 16, 4), None, (2, 4), "2 x 4"),
        ((2, 16, 4), (2, 5, 4), (4, 4), r"\[2, 4, c2\]"),
        ((2, 16, 4), (1, 4, 4), (4, 4), r"\[1, 4, 4\]"),
        ((2, 16, 0), None, (4, 4), "0 channels"),
    ],
)
def test_wrong_shapes_are_named(siglip, convnext, grid, said):
    with pytest.raises(ValueError, match=said):
        pixel_shuffle_concat(torch.zeros(siglip), None if convnext is None else torch.zeros(convnext), grid=grid)


def test_wrong_norms_and_dtypes_are_named():
    siglip = torch.zeros(1, 4, 3)
    with pytest.raises(ValueError, match="only one of them"):
        pixel_shuffle_concat(siglip, grid=(2, 2), weight=torch.ones(12))
    with pytest.raises(ValueError, match=r"not \[12\]"):
        pixel_shuffle_concat(siglip, grid=(2, 2), weight=torch.ones(3), bias=torch.ones(3))
    with pytest.raises(ValueError, match="float64"):
        pixel_shuffle_concat(siglip.double(), grid=(2, 2))
    wide = torch.ones(4 * 2049)
    with pytest.raises(ValueError, match="8196 channels .* at most 8192"):
        pixel_shuffle_concat(torch.zeros(1, 4, 2049), grid=(2, 2), weight=wide, bias=wide)


@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")
def test_cpu_tensors_are_refused_where_nothing_interprets():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        pixel_shuffle_concat(torch.zeros(1, 4, 3), grid=(2, 2))
