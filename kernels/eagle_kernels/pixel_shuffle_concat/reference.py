"""PixelShuffle, channel concatenation and LayerNorm in plain PyTorch: what the kernel has to compute, in any dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_shuffle_concat_reference(
    siglip: Tensor,
    convnext: Tensor | None = None,
    *,
    grid: tuple[int, int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Same arguments and result as ``pixel_shuffle_concat``. The order of the four tokens of a square is row by row,
    ``ps_version: v2`` of the released Eagle 2 and InternVL models."""
    n, tokens, channels = siglip.shape
    rows, columns = grid
    squares = siglip.reshape(n, rows // 2, 2, columns // 2, 2, channels).transpose(2, 3)
    joined = squares.reshape(n * (tokens // 4), 4 * channels)
    if convnext is not None:
        joined = torch.cat([joined, convnext.flatten(0, 1)], dim=-1)
    if weight is None:
        return joined
    return F.layer_norm(joined, joined.shape[-1:], weight, bias, eps)
