"""pixel_shuffle_concat on a GPU against eager PyTorch and torch.compile, forward and backward, with and without
LayerNorm.

    PYTHONPATH=kernels python benchmarks/kernels/bench_pixel_shuffle_concat.py

The aim: at least 85 % of the device's measured copy bandwidth without LayerNorm. Not run yet for want of a GPU.
"""

from collections.abc import Callable, Iterator

import torch
from eagle_kernels.checking.registry import Roofline
from eagle_kernels.pixel_shuffle_concat import pixel_shuffle_concat, pixel_shuffle_concat_reference
from eagle_kernels.pixel_shuffle_concat.entry import CONVNEXT, GRID, SIGLIP
from harness import Measurement, arguments, copy_bandwidth, measure, require_gpu, write_report
from torch import Tensor

TILES = (2, 26, 104)


def main() -> None:
    """Measures every case and writes the report."""
    folder = arguments(__doc__.splitlines()[0])
    device = require_gpu()
    found = [one for tiles in TILES for norm in (False, True) for one in measured(tiles, norm, device)]
    write_report("pixel_shuffle_concat", found, copy_bandwidth(device), folder)


def measured(tiles: int, norm: bool, device: torch.device) -> Iterator[Measurement]:
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

        yield measure(f"{label}, forward", contender, Roofline(2 * once, 0), forward)
        out = forward()

        def backward(out: Tensor = out) -> object:
            return torch.autograd.grad(out, inputs, d_out, retain_graph=True)

        yield measure(f"{label}, backward", contender, Roofline((3 if norm else 2) * once, 0), backward)


def contenders() -> dict[str, Callable[..., Tensor]]:
    """Functions of the same arguments, by the name they have in the report."""
    return {
        "eagle_kernels": pixel_shuffle_concat,
        "eager": pixel_shuffle_concat_reference,
        "torch.compile": torch.compile(pixel_shuffle_concat_reference),
    }


if __name__ == "__main__":
    main()
