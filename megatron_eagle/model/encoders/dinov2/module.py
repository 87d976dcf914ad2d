"""DINOv2: the patches' last hidden state after the last norm, shuffled; the class token is dropped behind it.

A layer scales what its attention and its MLP add, channel by channel, by learned numbers (LayerScale).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_eagle.model.build_context import BuildContext
from megatron_eagle.model.encoders.dinov2.config import Config
from megatron_eagle.model.vit.module import Vit, pixel_shuffle

MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1], ImageNet
STD = (0.229, 0.224, 0.225)


class Encoder(Vit):
    """uint8 tiles [n, 3, image_size, image_size] -> [n, output_tokens, output_channels]."""

    def __init__(self, dinov2: Config, build: BuildContext) -> None:
        scale = torch.full((dinov2.hidden_size,), dinov2.layerscale_value, dtype=build.dtype)
        super().__init__(
            dinov2, build, activation=F.gelu, residual=ModuleSpec(module=LayerScale, params={"initial": scale})
        )
        self.class_token = nn.Parameter(torch.empty(1, dinov2.hidden_size, dtype=build.dtype))

    def forward(self, tiles: Tensor) -> Tensor:
        features = self.from_pixels(normalise(tiles).to(self.patch_embedding.weight.dtype))
        return pixel_shuffle(features.unflatten(1, self.grid)).flatten(1, 2)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """The last hidden state after the last norm, one token per patch: [n, patches, hidden_size].

        pixels: normalised, [n, 3, image_size, image_size] in the dtype of the weights.
        """
        tokens = torch.cat([self.class_token.expand(len(pixels), 1, -1), self.embed(pixels)], dim=1)
        return self.transform(tokens + self.position_embedding)[:, 1:]


class LayerScale(nn.Module):
    """In the place of Megatron's bias-dropout-add: residual + scale * (output + bias). There is no dropout."""

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(initial.clone())

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor], Tensor, float], Tensor]:
        return self._add

    def _add(self, output_and_bias: tuple[Tensor, Tensor], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_and_bias
        return torch.addcmul(residual, output + bias, self.scale)


def normalise(tiles: Tensor) -> Tensor:
    """uint8 -> float32: scaled to [0, 1], then ImageNet's mean taken off and divided by its standard deviation."""
    mean, std = (torch.tensor(values, device=tiles.device).view(3, 1, 1) for values in (MEAN, STD))
    return tiles.float() / (255.0 * std) - mean / std
