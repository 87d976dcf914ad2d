"""How tile_prepare is checked: values against float64, the build for Eagle 2's sizes, bytes counted."""

import torch

from eagle_kernels.checking.registry import Check, Compilation, KernelEntry, Roofline
from eagle_kernels.tile_prepare import tile_prepare, tile_prepare_reference
from eagle_kernels.tile_prepare.op import BLOCK, prepare_kernel

SIGLIP_SIZE, CONVNEXT_SIZE = 448, 512  # pixels, Eagle 2
TILES = 26  # two images of 12 tiles and a thumbnail


def worst_error(
    device: torch.device, dtype: torch.dtype, *, tiles: int = 2, size: int = 28, convnext_size: int | None = 32
) -> float:
    """The largest absolute error of either output, in standard deviations of the pixels, reference in float64."""
    generator = torch.Generator().manual_seed(size)
    raw = torch.randint(0, 256, (tiles, 3, size, size), generator=generator, dtype=torch.uint8).to(device)
    got = tile_prepare(raw, convnext_size=convnext_size, dtype=dtype)
    expected = tile_prepare_reference(raw, convnext_size=convnext_size, dtype=torch.float64)
    errors = [torch.zeros(1, dtype=torch.float64, device=device)]
    for ours, exact in zip(got, expected, strict=True):
        if ours is not None and exact is not None:
            errors.append((ours.double() - exact).abs().flatten())
    return torch.cat(errors).max().item()


def _check(label: str, tolerance: float, dtype: torch.dtype, **options: int | None) -> Check:
    return Check(label, lambda device: worst_error(device, dtype, **options), tolerance)  # type: ignore[arg-type]


# Values reach 2.7, where bfloat16 numbers are 2**-6 apart; the rest is float32 arithmetic before that rounding.
HALF_STEP = 2.0**-7 + 1e-6
CHECKS = (
    _check("fp32, 28 to 32", 1e-6, torch.float32),
    _check("fp32, 37 to 19", 1e-6, torch.float32, size=37, convnext_size=19),
    _check("fp32, 33 to 33", 1e-6, torch.float32, size=33, convnext_size=33),
    _check("fp32, 5 to 1", 1e-6, torch.float32, size=5, convnext_size=1),
    _check("fp32, siglip only", 1e-6, torch.float32, convnext_size=None),
    _check("fp32, no tiles", 0.0, torch.float32, tiles=0),
    _check("bf16, 28 to 32", HALF_STEP, torch.bfloat16),
    _check("fp32, 448 to 512", 1e-6, torch.float32, tiles=1, size=SIGLIP_SIZE, convnext_size=CONVNEXT_SIZE),
)
GPU_CHECKS = (
    _check(
        "bf16, 26 tiles of Eagle 2",
        HALF_STEP,
        torch.bfloat16,
        tiles=TILES,
        size=SIGLIP_SIZE,
        convnext_size=CONVNEXT_SIZE,
    ),
)


def compilations() -> list[Compilation]:
    """With and without ConvNeXt, for both dtypes of training."""
    return [_compilation(dtype, resize) for dtype in ("bf16", "fp32") for resize in (True, False)]


def _compilation(dtype: str, resize: bool) -> Compilation:
    pointers = {"tiles": "*u8", "siglip": f"*{dtype}"}
    constexprs: dict[str, object] = {"SIZE": SIGLIP_SIZE, "RESIZED": CONVNEXT_SIZE if resize else 0, "BLOCK": BLOCK}
    if resize:
        pointers["convnext"] = f"*{dtype}"
    else:
        constexprs["convnext"] = None
    floats = {f"{kind}_{colour}": "fp32" for kind in ("scale", "shift") for colour in ("red", "green", "blue")}
    label = f"{dtype}, siglip+convnext" if resize else f"{dtype}, siglip"
    return Compilation(label, prepare_kernel, pointers | floats, constexprs, tuple(pointers), num_warps=4)


def _roofline() -> Roofline:
    """One byte read per raw value, two written per value in bfloat16."""
    raw, resized = (TILES * 3 * side * side for side in (SIGLIP_SIZE, CONVNEXT_SIZE))
    return Roofline(bytes_moved=raw + 2 * (raw + resized), operations=0)


ENTRY = KernelEntry(
    name="tile_prepare",
    checks=CHECKS,
    compilations=compilations,
    rooflines={f"{TILES} tiles of {SIGLIP_SIZE}, to {CONVNEXT_SIZE}, bf16": _roofline()},
    gpu_checks=GPU_CHECKS,
)
