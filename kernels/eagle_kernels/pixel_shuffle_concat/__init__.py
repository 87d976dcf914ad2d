"""PixelShuffle of SigLIP's tokens, joined with ConvNeXt's, optionally normalised: written to memory once."""

import torch
from torch import Tensor

from eagle_kernels.device import require_device
from eagle_kernels.pixel_shuffle_concat.op import MAX_WIDTH, Join, JoinNorm, Sizes, dense
from eagle_kernels.pixel_shuffle_concat.reference import pixel_shuffle_concat_reference

__all__ = ["pixel_shuffle_concat", "pixel_shuffle_concat_reference"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pixel_shuffle_concat(
    siglip: Tensor,
    convnext: Tensor | None = None,
    *,
    grid: tuple[int, int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Joins each 2x2 square of SigLIP's tokens into one, and ConvNeXt's token of the same place to it.

    Args:
        siglip: [n, rows * columns, c1], float32, float16 or bfloat16; rows of tokens one after the other.
        convnext: [n, rows * columns / 4, c2] of the same dtype, or None.
        grid: (rows, columns) of SigLIP's tokens, both even.
        weight, bias: [4 * c1 + c2] of a LayerNorm over the joined channels, both or none.
        eps: of that LayerNorm; 1e-5 in Eagle 2's connector.

    Returns:
        [n * rows * columns / 4, 4 * c1 + c2] in the dtype of ``siglip``. Channels of a token: SigLIP's tokens of the
        square in the order (row 0, column 0), (0, 1), (1, 0), (1, 1), then ConvNeXt's. Differentiable once in all
        tensors.

    Raises:
        ValueError: shapes or dtypes that do not fit, with the numbers.
        RuntimeError: tensors where no kernel can run (``eagle_kernels.device``).
    """
    sizes = _checked(siglip, convnext, grid)
    _check_norm(sizes.width, weight, bias)
    require_device(
        "pixel_shuffle_concat", *(tensor for tensor in (siglip, convnext, weight, bias) if tensor is not None)
    )
    siglip = dense(siglip)
    convnext = None if convnext is None else dense(convnext)
    if weight is None or bias is None:
        return Join.apply(siglip, convnext, sizes)
    return JoinNorm.apply(siglip, convnext, weight.contiguous(), bias.contiguous(), eps, sizes)


def _checked(siglip: Tensor, convnext: Tensor | None, grid: tuple[int, int]) -> Sizes:
    rows, columns = grid
    even = rows > 0 and columns > 0 and rows % 2 == columns % 2 == 0
    if siglip.dim() != 3 or siglip.shape[1] != rows * columns or not even:
        raise ValueError(f"siglip {list(siglip.shape)} is not [n, {rows} x {columns}, c1] with an even grid")
    n, tokens, c1 = siglip.shape
    c2 = 0
    if convnext is not None:
        if convnext.dim() != 3 or convnext.shape[:2] != (n, tokens // 4) or convnext.shape[2] == 0:
            raise ValueError(
                f"convnext {list(convnext.shape)} is not [{n}, {tokens // 4}, c2], siglip {list(siglip.shape)}"
            )
        c2 = convnext.shape[2]
    dtypes = {tensor.dtype for tensor in (siglip, convnext) if tensor is not None}
    if c1 == 0 or len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise ValueError(
            f"needs one dtype of {DTYPES} and at least 1 channel, got {dtypes} and {c1} channels of siglip"
        )
    return Sizes(n * (tokens // 4), rows, columns, c1, c2)


def _check_norm(width: int, weight: Tensor | None, bias: Tensor | None) -> None:
    if weight is None and bias is None:
        return
    if weight is None or bias is None:
        raise ValueError("LayerNorm needs weight and bias, got only one of them")
    if weight.shape != (width,) or bias.shape != (width,):
        raise ValueError(
            f"weight {list(weight.shape)} and bias {list(bias.shape)} are not [{width}], the joined channels"
        )
    if width > MAX_WIDTH:
        raise ValueError(f"{width} channels to normalise, the kernel holds at most {MAX_WIDTH}")
