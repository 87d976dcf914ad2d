"""ConvNeXt with tensor parallelism in its linear layers.

Stem and four stages only, without the head and its norm; the feature is the last stage's map at stride 32, flattened
row by row. The tile is resized to ``image_size`` first, so that the map has as many positions as SigLIP has tokens.
Block: 7x7 depthwise convolution - LayerNorm - Linear - GELU - Linear - scale per channel, added to the input. The two
linear layers, nearly all of the parameters, are split over the tensor-parallel processes; the rest is replicated.
"""

import itertools

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_eagle.model.build_context import BuildContext, no_init, parallel_config
from megatron_eagle.model.encoders.convnext.config import EXPANSION, KERNEL, STEM, Config
from megatron_eagle.model.norm import LayerNorm
from megatron_eagle.model.weights import ShardedList

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1], OpenAI CLIP
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Encoder(MegatronModule):
    """uint8 tiles [n, 3, s, s] -> [n, output_tokens, output_channels]."""

    def __init__(self, convnext: Config, build: BuildContext) -> None:
        config = parallel_config(build)
        super().__init__(config=config)
        self.tp_group = build.groups.tp
        self.image_size = convnext.image_size
        self.recompute = build.recomputes_layers
        sizes, eps = convnext.hidden_sizes, convnext.layer_norm_eps
        self.stem = nn.Conv2d(3, sizes[0], STEM, stride=STEM, dtype=build.dtype)
        self.stem_norm = LayerNorm(config, sizes[0], eps)
        stages = []
        for number, (depth, size) in enumerate(zip(convnext.depths, sizes, strict=True)):
            blocks = [Block(size, convnext, config, build.groups.tp) for _ in range(depth)]
            shrink = [Shrink(sizes[number - 1], size, eps, config)] if number else []
            stages.append(ShardedList([*shrink, *blocks]))
        self.stages = ShardedList(stages)

    def forward(self, tiles: Tensor) -> Tensor:
        return self.from_pixels(prepare(tiles, self.image_size).to(self.stem.weight.dtype))

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Resized and normalised pixels [n, 3, image_size, image_size], in the dtype of the weights, to features.

        Maps stay channels-last [n, rows, columns, channels] between the convolutions.
        """
        features = self.stem_norm(self.stem(pixels).permute(0, 2, 3, 1))
        for layer in itertools.chain.from_iterable(stage.children() for stage in self.stages):
            if self.recompute and torch.is_grad_enabled():
                features = checkpoint(layer, features, use_reentrant=False)
            else:
                features = layer(features)
        return features.flatten(1, 2)


class Shrink(MegatronModule):
    """Between stages: LayerNorm, then a 2x2 convolution of stride 2. [n, h, w, c] -> [n, h/2, w/2, size]."""

    def __init__(self, channels: int, size: int, eps: float, config: ModelParallelConfig) -> None:
        super().__init__(config=config)
        self.norm = LayerNorm(config, channels, eps)
        self.conv = nn.Conv2d(channels, size, 2, stride=2, dtype=config.params_dtype)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv(self.norm(features).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(MegatronModule):
    """One ConvNeXt block, [n, h, w, size] -> the same."""

    def __init__(self, size: int, convnext: Config, config: ModelParallelConfig, tp_group: object) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        parallel = {"config": config, "init_method": no_init, "tp_group": tp_group, "skip_bias_add": False}
        self.depthwise = nn.Conv2d(size, size, KERNEL, padding=KERNEL // 2, groups=size, dtype=config.params_dtype)
        self.norm = LayerNorm(config, size, convnext.layer_norm_eps)
        self.linear_fc1 = ColumnParallelLinear(size, EXPANSION * size, **parallel)
        self.linear_fc2 = RowParallelLinear(EXPANSION * size, size, bias=True, input_is_parallel=True, **parallel)
        scale = torch.full((size,), convnext.layer_scale_init_value, dtype=config.params_dtype)
        self.layer_scale = nn.Parameter(scale)

    def forward(self, features: Tensor) -> Tensor:
        n, rows, columns, _ = features.shape
        mixed = self.depthwise(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        hidden, _ = self.linear_fc1(self.norm(mixed).reshape(n, rows * columns, -1))
        change, _ = self.linear_fc2(F.gelu(hidden))
        return features + (self.layer_scale * change).view_as(features)


def prepare(tiles: Tensor, image_size: int) -> Tensor:
    """uint8 [n, 3, s, s] -> float32 [n, 3, image_size, image_size], resized and in CLIP's normalisation.

    The released model resizes tiles that were already normalised for SigLIP and maps them to CLIP's statistics
    afterwards. Resizing takes weighted means and the rest is affine, so that the order changes no number; before the
    resize there are fewer pixels to normalise. By numbers and channel by channel: a tensor of the statistics would have
    to come from the host, for which the device waits.
    """
    pixels = tiles.to(torch.float32, copy=True)
    for channel, (mean, std) in enumerate(zip(CLIP_MEAN, CLIP_STD, strict=True)):
        pixels[:, channel].div_(255.0 * std).sub_(mean / std)
    if pixels.shape[-1] != image_size:
        pixels = F.interpolate(pixels, size=(image_size, image_size), mode="bilinear", align_corners=True)
    return pixels
