"""What the two encoders of Eagle 2 read, computed from raw tiles in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in [0, 1]: OpenAI CLIP, used by timm's ConvNeXt
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def tile_prepare_reference(
    tiles: Tensor, *, convnext_size: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Same arguments and result as ``tile_prepare``; the arithmetic is in float32, or in float64 if that is ``dtype``.

    The released Eagle 2 code resizes tiles that are already normalised for SigLIP and maps them to CLIP's statistics
    afterwards; all three steps are affine, so normalising the resized raw pixels gives the same numbers.
    """
    pixels = tiles.to(torch.float64 if dtype is torch.float64 else torch.float32)
    siglip = pixels / 127.5 - 1.0
    if convnext_size is None:
        return siglip.to(dtype), None
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    if convnext_size != tiles.shape[-1] and tiles.shape[0]:
        size = (convnext_size, convnext_size)
        pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=True)
    elif not tiles.shape[0]:
        pixels = pixels.new_empty(0, 3, convnext_size, convnext_size)
    return siglip.to(dtype), ((pixels / 255.0 - mean) / std).to(dtype)
