"""tile_prepare on a GPU against eager PyTorch and torch.compile, for SigLIP alone and with ConvNeXt's input.

Not run yet for want of a GPU.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from eagle_kernels.checking.registry import Roofline
from eagle_kernels.checking.timing import Aim, Measurement, measure
from eagle_kernels.tile_prepare import tile_prepare, tile_prepare_reference
from eagle_kernels.tile_prepare.entry import CONVNEXT_SIZE, SIGLIP_SIZE

TILES, TOY_TILES = (2, 26, 104), (1,)


def measured(device: torch.device, toy: bool) -> Iterator[Measurement]:
    """All contenders on all cases."""
    for tiles in TOY_TILES if toy else TILES:
        for size in (None, CONVNEXT_SIZE):
            yield from _measured(tiles, size, device)


def aims(found: Sequence[Measurement], bandwidth: float | None) -> list[Aim]:
    """None were set."""
    return []


def _measured(tiles: int, convnext_size: int | None, device: torch.device) -> Iterator[Measurement]:
    """All contenders at Eagle 2's tile size, results in bfloat16."""
    raw = torch.randint(0, 256, (tiles, 3, SIGLIP_SIZE, SIGLIP_SIZE), dtype=torch.uint8, device=device)
    written = tiles * 3 * (SIGLIP_SIZE**2 + (convnext_size or 0) ** 2)
    roofline = Roofline(bytes_moved=raw.numel() + 2 * written, operations=0)
    label = f"{tiles} tiles{', ConvNeXt' if convnext_size else ''}"
    for contender, function in contenders().items():

        def prepared(function: Callable[..., object] = function) -> object:
            return function(raw, convnext_size=convnext_size, dtype=torch.bfloat16)

        yield measure(device, label, contender, roofline, prepared)


def contenders() -> dict[str, Callable[..., object]]:
    """Functions of the same arguments, by the name they have in the report."""
    return {
        "eagle_kernels": tile_prepare,
        "eager": tile_prepare_reference,
        "torch.compile": torch.compile(tile_prepare_reference),
    }
