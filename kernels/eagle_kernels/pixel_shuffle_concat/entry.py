"""How pixel_shuffle_concat is checked: values against float64, builds for the widths of Eagle 2, bytes counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagle_kernels.checking.registry import Check, Compilation, KernelEntry, Roofline
from eagle_kernels.pixel_shuffle_concat import op, pixel_shuffle_concat, pixel_shuffle_concat_reference

SIGLIP, CONVNEXT = 1152, 3072  # channels of so400m and of convnext_xxlarge
GRID = (32, 32)  # 448 pixels in patches of 14
TILES = 26  # two images of 12 tiles and a thumbnail, about what one pack of 16 384 tokens holds


def worst_error(
    device: torch.device,
    dtype: torch.dtype,
    *,
    tiles: int = 2,
    grid: tuple[int, int] = (4, 6),
    c1: int = 40,
    c2: int = 24,
    norm: bool = False,
    transposed: bool = False,
) -> float:
    """The largest error of output and gradients over (1 + the reference's magnitude), reference in float64.

    ``transposed`` gives the layout of a Megatron encoder, [tokens, n, c] seen as [n, tokens, c].
    """
    generator = torch.Generator().manual_seed(tiles * 1000 + c1 * 10 + c2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def tokens(count: int, channels: int) -> Tensor:
        return draw(count, tiles, channels).transpose(0, 1) if transposed else draw(tiles, count, channels)

    squares = grid[0] * grid[1] // 4
    inputs: dict[str, Tensor | None] = {
        "siglip": tokens(4 * squares, c1),
        "convnext": tokens(squares, c2) if c2 else None,
    }
    if norm:
        inputs |= {"weight": draw(4 * c1 + c2), "bias": draw(4 * c1 + c2)}
    d_out = draw(tiles * squares, 4 * c1 + c2)
    got = _with_gradients(pixel_shuffle_concat, inputs, d_out, grid)
    exact = {name: None if tensor is None else tensor.double() for name, tensor in inputs.items()}
    expected = _with_gradients(pixel_shuffle_concat_reference, exact, d_out.double(), grid)
    errors = [((a.double() - b).abs() / (1 + b.abs())).flatten() for a, b in zip(got, expected, strict=True)]
    return torch.cat([torch.zeros(1, dtype=torch.float64, device=device), *errors]).max().item()


def _with_gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor | None], d_out: Tensor, grid: tuple[int, int]
) -> list[Tensor]:
    leaves = {name: None if tensor is None else tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = function(**leaves, grid=grid)
    return [out, *torch.autograd.grad(out, [leaf for leaf in leaves.values() if leaf is not None], d_out)]


def _check(label: str, tolerance: float, dtype: torch.dtype, **options: object) -> Check:
    return Check(label, lambda device: worst_error(device, dtype, **options), tolerance)  # type: ignore[arg-type]


# A copy is exact. LayerNorm: float32 rounding; in bfloat16 one rounding of each result, 2**-8 of it at most.
CHECKS = (
    _check("copy fp32, odd channels", 0.0, torch.float32, c1=5, c2=7),
    _check("copy bf16, siglip only", 0.0, torch.bfloat16, c2=0),
    _check("copy bf16, transposed", 0.0, torch.bfloat16, transposed=True),
    _check("copy bf16, widths of Eagle 2", 0.0, torch.bfloat16, tiles=1, grid=(2, 4), c1=SIGLIP, c2=CONVNEXT),
    _check("copy, no tiles", 0.0, torch.float32, tiles=0),
    _check("norm fp32", 2e-6, torch.float32, norm=True),
    _check("norm fp32, odd channels", 2e-6, torch.float32, norm=True, c1=5, c2=7, transposed=True),
    _check(
        "norm fp32, widths of Eagle 2", 2e-6, torch.float32, norm=True, tiles=2, grid=(2, 4), c1=SIGLIP, c2=CONVNEXT
    ),
    _check("norm bf16", 4e-3, torch.bfloat16, norm=True),
    _check("norm fp32, no tiles", 0.0, torch.float32, norm=True, tiles=0),
)
GPU_CHECKS = (
    _check("copy bf16, 26 tiles of Eagle 2", 0.0, torch.bfloat16, tiles=TILES, grid=GRID, c1=SIGLIP, c2=CONVNEXT),
    _check(
        "norm bf16, 26 tiles of Eagle 2",
        4e-3,
        torch.bfloat16,
        norm=True,
        tiles=TILES,
        grid=GRID,
        c1=SIGLIP,
        c2=CONVNEXT,
    ),
)


def compilations() -> list[Compilation]:
    """Every kernel at the widths of Eagle 2 and at odd ones without wide loads, LayerNorm at the widest token."""
    built = []
    for label, c1, c2 in (
        ("siglip+convnext", SIGLIP, CONVNEXT),
        ("siglip", SIGLIP, 0),
        ("odd", SIGLIP - 1, CONVNEXT - 1),
    ):
        built += [_join(label, c1, c2), _split(label, c1, c2)]
        built += [_join_norm(label, c1, c2), _split_norm(label, c1, c2)]
    widest = op.MAX_WIDTH // 4
    built += [_join_norm("widest", widest, 0), _split_norm("widest", widest, 0)]
    built += [
        _join_norm("siglip+convnext", SIGLIP, CONVNEXT, "fp32"),
        _split_norm("siglip+convnext", SIGLIP, CONVNEXT, "fp32"),
    ]
    return built


def _join(label: str, c1: int, c2: int) -> Compilation:
    tiling = op.copy_tiling(4 * c1 + c2)
    pointers = dict.fromkeys(("siglip", "convnext", "out"), "*bf16")
    return _compilation(f"join bf16 {label}", op.join_kernel, pointers, c1, c2, tiling, {})


def _split(label: str, c1: int, c2: int) -> Compilation:
    tiling = op.copy_tiling(4 * c1 + c2)
    pointers = dict.fromkeys(("d_out", "d_siglip", "d_convnext"), "*bf16")
    return _compilation(f"split bf16 {label}", op.split_kernel, pointers, c1, c2, tiling, _to(c2))


def _join_norm(label: str, c1: int, c2: int, dtype: str = "bf16") -> Compilation:
    tiling = op.norm_tiling(4 * c1 + c2, op.FORWARD_ELEMENTS)
    pointers = dict.fromkeys(("siglip", "convnext", "weight", "bias", "out"), f"*{dtype}")
    pointers |= {"mean": "*fp32", "rstd": "*fp32"}
    return _compilation(f"join+norm {dtype} {label}", op.join_norm_kernel, pointers, c1, c2, tiling, {})


def _split_norm(label: str, c1: int, c2: int, dtype: str = "bf16") -> Compilation:
    tiling = op.norm_tiling(4 * c1 + c2, op.BACKWARD_ELEMENTS)
    pointers = dict.fromkeys(("d_out", "siglip", "convnext", "weight", "d_siglip", "d_convnext"), f"*{dtype}")
    pointers |= dict.fromkeys(("mean", "rstd", "d_weight", "d_bias"), "*fp32")
    return _compilation(f"split+norm {dtype} {label}", op.split_norm_kernel, pointers, c1, c2, tiling, _to(c2))


def _to(c2: int) -> dict[str, object]:
    return {"TO_SIGLIP": True, "TO_CONVNEXT": c2 > 0}


def _compilation(
    label: str,
    kernel: Any,
    pointers: dict[str, str],
    c1: int,
    c2: int,
    tiling: dict[str, int],
    flags: dict[str, object],
) -> Compilation:
    """The arguments as at launch: without ConvNeXt its pointers are None, strides are multiples of the channels."""
    absent = {name for name in pointers if "convnext" in name and not c2}
    constexprs: dict[str, object] = {"C1": c1, "C2": c2, "TOKENS": tiling["TOKENS"], "BLOCK": tiling["BLOCK"]}
    constexprs |= flags | dict.fromkeys(absent)
    present = {name: kind for name, kind in pointers.items() if name not in absent}
    strides = ("s_tile", "s_token", "c_tile", "c_token")
    signature = present | dict.fromkeys(("tokens", "rows", "columns", *strides), "i32")
    if "eps" in kernel.arg_names:
        signature["eps"] = "fp32"
    odd = c1 % 16 > 0 or c2 % 16 > 0
    aligned = (*present, *(() if odd else strides))
    # Without wide loads the addresses alone take more registers than LayerNorm's backward has: right, but it spills.
    chosen = not (odd and kernel is op.split_norm_kernel)
    return Compilation(label, kernel, signature, constexprs, aligned, num_warps=tiling["num_warps"], chosen=chosen)


def _roofline(passes: int) -> Roofline:
    """``passes`` over the joined tensor of TILES tiles in bfloat16; what there is of arithmetic does not count."""
    return Roofline(bytes_moved=passes * TILES * GRID[0] * GRID[1] // 4 * (4 * SIGLIP + CONVNEXT) * 2, operations=0)


ENTRY = KernelEntry(
    name="pixel_shuffle_concat",
    checks=CHECKS,
    compilations=compilations,
    rooflines={
        f"forward, {TILES} tiles, bf16, 1152 and 3072 channels": _roofline(2),
        "backward": _roofline(2),
        "backward with LayerNorm": _roofline(3),
    },
    gpu_checks=GPU_CHECKS,
)
