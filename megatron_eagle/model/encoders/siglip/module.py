"""SigLIP: the last hidden state after ``post_layernorm``, shuffled; the pooling head is not part of it."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from megatron_eagle.model.build_context import BuildContext
from megatron_eagle.model.encoders.siglip.config import Config
from megatron_eagle.model.vit.module import Vit, pixel_shuffle


class Encoder(Vit):
    """uint8 tiles [n, 3, image_size, image_size] -> [n, output_tokens, output_channels]."""

    def __init__(self, siglip: Config, build: BuildContext) -> None:
        super().__init__(siglip, build, activation=partial(F.gelu, approximate="tanh"))

    def forward(self, tiles: Tensor) -> Tensor:
        features = self.from_pixels(normalise(tiles).to(self.patch_embedding.weight.dtype))
        return pixel_shuffle(features.unflatten(1, self.grid)).flatten(1, 2)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """The last hidden state after ``post_layernorm``, one token per patch: [n, patches, hidden_size].

        pixels: normalised, [n, 3, image_size, image_size] in the dtype of the weights.
        """
        return self.transform(self.embed(pixels) + self.position_embedding)


def normalise(tiles: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: scaled to [0, 1], mean 0.5, standard deviation 0.5 (SigLIP's image processor)."""
    return tiles.float() / 127.5 - 1.0
