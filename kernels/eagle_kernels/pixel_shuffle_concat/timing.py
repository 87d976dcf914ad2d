"""pixel_shuffle_concat on a GPU against eager PyTorch and torch.compile, forward and backward, with and without
LayerNorm.

The aim: at least 85 % of the device's measured copy bandwidth without LayerNorm. Not run yet for want of a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from eagle_kernels.checking.registry import Roofline
from eagle_kernels.checking.timing import Aim, Measurement, measure
from eagle_kernels.pixel_shuffle_concat import pixel_shuffle_concat, pixel_shuffle_concat_reference
from eagle_kernels.pixel_shuffle_concat.entry import CONVNEXT, GRID, SIGLIP

TILES, TOY_TILES = (2, 26, 104), (1,)
SHARE_OF_COPY = 0.85


def measured(device: torch.device, toy: bool) -> Iterator[Measurement]:
    """All contenders on all cases."""
    for tiles in TOY_TILES if toy else TILES:
        for norm in (False, True):
            yield from _measured(tiles, norm, device)


def aims(found: Sequence[Measurement], bandwidth: float | None) -> list[Aim]:
    """Without LayerNorm, at the tiles of a pack and more."""
    reached = []
    for one in found:
        aimed = one.contender == "eagle_kernels" and "LayerNorm" not in one.case and not one.case.startswith("2 tiles")
        if aimed and bandwidth and one.bytes_per_second:
            share = one.bytes_per_second / bandwidth
            aim = f"pixel_shuffle_concat, {one.case}: >= {SHARE_OF_COPY:.0%} of copy bandwidth"
            reached.append(Aim(aim, f"{share:.0%}", share >= SHARE_OF_COPY))
    return reached


def _measured(tiles: int, norm: bool, device: torch.device) -> Iterator[Measurement]:
    """All contenders at the sizes of Eagle 2 9B in bfloat16; SigLIP's tokens as Megatron's encoder leaves them."""
    count, width = GRID[0] * GRID[1], 4 * SIGLIP + CONVNEXT

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    inputs = [draw(count, tiles, SIGLIP).transpose(0, 1), draw(tiles, count // 4, CONVNEXT)]
    inputs += [draw(width), draw(width)] if norm else []
    for tensor in inputs:
        tensor.requires_grad_()
    d_out = draw(tiles * count // 4, width)
    label = f"{tiles} tiles{', LayerNorm' if norm else ''}"
    once = d_out.numel() * d_out.element_size()
    for contender, function in contenders().items():
        weight, bias = inputs[2:] if norm else (None, None)

        def forward(function: Callable[..., Tensor] = function, weight=weight, bias=bias) -> Tensor:
            return function(inputs[0], inputs[1], grid=GRID, weight=weight, bias=bias)

        yield measure(device, f"{label}, forward", contender, Roofline(2 * once, 0), forward)
        graph = cache(forward)  # made by the first run, which is not measured

        def backward(graph: Callable[[], Tensor] = graph) -> object:
            return torch.autograd.grad(graph(), inputs, d_out, retain_graph=True)

        yield measure(device, f"{label}, backward", contender, Roofline((3 if norm else 2) * once, 0), backward)


def contenders() -> dict[str, Callable[..., Tensor]]:
    """Functions of the same arguments, by the name they have in the report."""
    return {
        "eagle_kernels": pixel_shuffle_concat,
        "eager": pixel_shuffle_concat_reference,
        "torch.compile": torch.compile(pixel_shuffle_concat_reference),
    }
