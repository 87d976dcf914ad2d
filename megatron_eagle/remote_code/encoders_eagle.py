# Copyright 2026 the megatron-eagle authors. Licensed under the Apache License, Version 2.0.
"""The encoders of an Eagle: what makes features of tiles, under the names of the released checkpoints.

Part of an exported folder, which transformers loads it from with ``trust_remote_code=True``. transformers' SigLIP and
DINOv2 are used as they are; ConvNeXt is written here, because released checkpoints have timm's names and transformers'
ConvNeXt has others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel
from transformers.modeling_layers import GradientCheckpointingLayer

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEM, KERNEL, EXPANSION = 4, 7, 4  # of a ConvNeXt: side of its patches and of its kernels, width of its MLPs


class Siglip(SiglipVisionModel):
    """transformers' SigLIP; a class of another name, whose tensors transformers does not rename when it saves them."""


class SiglipTower(nn.Module):
    """SigLIP without its pooling head, where released checkpoints have it."""

    def __init__(self, numbers: Mapping[str, Any], attention: str | None) -> None:
        super().__init__()
        config = SiglipVisionConfig(**{**numbers, "vision_use_head": False}, attn_implementation=attention)
        self.vision_model = Siglip(config)


class ConvNextTower(nn.Module):
    """timm's ConvNeXt without its head. Maps are [n, rows, columns, channels] between the convolutions."""

    def __init__(self, numbers: Mapping[str, Any], attention: str | None) -> None:
        super().__init__()
        self.image_size = numbers["image_size"]
        sizes, eps = numbers["hidden_sizes"], numbers["layer_norm_eps"]
        self.stem = nn.Sequential(nn.Conv2d(3, sizes[0], STEM, stride=STEM), nn.LayerNorm(sizes[0], eps=eps))
        stages = zip([None, *sizes[:-1]], sizes, numbers["depths"], strict=True)
        self.stages = nn.ModuleList(ConvNextStage(before, size, depth, eps) for before, size, depth in stages)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.stem[1](self.stem[0](pixels).permute(0, 2, 3, 1))
        for stage in self.stages:
            features = stage(features)
        return features


class ConvNextStage(nn.Module):
    """A layer that halves the map, except in the first stage, and blocks."""

    def __init__(self, before: int | None, size: int, depth: int, eps: float) -> None:
        super().__init__()
        if before is not None:
            self.downsample = nn.Sequential(nn.LayerNorm(before, eps=eps), nn.Conv2d(before, size, 2, stride=2))
        self.blocks = nn.ModuleList(ConvNextBlock(size, eps) for _ in range(depth))

    def forward(self, features: Tensor) -> Tensor:
        if hasattr(self, "downsample"):
            features = channels_last(self.downsample[1], self.downsample[0](features))
        for block in self.blocks:
            features = block(features)
        return features


class ConvNextBlock(GradientCheckpointingLayer):
    """Depthwise convolution, norm, MLP, scaled by ``weight`` (timm's ``gamma``) and added to the input."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(size, size, KERNEL, padding=KERNEL // 2, groups=size)
        self.norm = nn.LayerNorm(size, eps=eps)
        inner = EXPANSION * size
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(size, inner), "fc2": nn.Linear(inner, size)})
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.gelu(self.mlp["fc1"](self.norm(channels_last(self.conv_dw, features))))
        return features + self.weight * self.mlp["fc2"](hidden)


def channels_last(convolution: nn.Module, features: Tensor) -> Tensor:
    """A convolution of a map [n, rows, columns, channels]."""
    return convolution(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def dinov2(numbers: Mapping[str, Any], attention: str | None) -> nn.Module:
    """transformers' DINOv2 without the token that stands for masked patches."""
    ratio = numbers["intermediate_size"] // numbers["hidden_size"]
    said = {**numbers, "mlp_ratio": ratio, "use_mask_token": False}
    return Dinov2Model(Dinov2Config(**said, attn_implementation=attention))


def siglip_features(tower: Any, pixels: Tensor) -> Tensor:
    """The last hidden state after ``post_layernorm``, shuffled."""
    siglip = tower.vision_model
    return shuffled(siglip(pixels.to(siglip.dtype)).last_hidden_state)


def convnext_features(tower: Any, pixels: Tensor) -> Tensor:
    """The last stage's map, row by row, of tiles that are resized first, both in float32."""
    if pixels.shape[-1] != tower.image_size:
        size = (tower.image_size, tower.image_size)
        pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=True)
    return tower(with_statistics(pixels, CLIP_MEAN, CLIP_STD).to(tower.stem[0].weight.dtype)).flatten(1, 2)


def dinov2_features(tower: Any, pixels: Tensor) -> Tensor:
    """The patches' last hidden state, shuffled."""
    hidden = tower(with_statistics(pixels, IMAGENET_MEAN, IMAGENET_STD).to(tower.dtype)).last_hidden_state
    return shuffled(hidden[:, 1:])


def shuffled(features: Tensor) -> Tensor:
    """[n, side * side, c] -> [n, side * side / 4, 4c]: every 2 x 2 square of tokens becomes one, row by row."""
    half = round(features.shape[1] ** 0.5) // 2
    squares = features.unflatten(1, (half, 2, half, 2))
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)


def with_statistics(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels in [-1, 1], normalised by the statistics of pixels in [0, 1] instead."""
    means, stds = (pixels.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pixels / 2 + 0.5 - means) / stds


@dataclass(frozen=True)
class Kind:
    """An encoder. build: its module of (numbers, attention); features: of (module, pixels [n, 3, side, side] in
    [-1, 1], float32) [n, tokens, channels]; channels: of its numbers."""

    build: Callable[[Mapping[str, Any], str | None], nn.Module]
    features: Callable[[Any, Tensor], Tensor]
    channels: Callable[[Mapping[str, Any]], int]


KINDS = {
    "siglip": Kind(SiglipTower, siglip_features, lambda numbers: 4 * numbers["hidden_size"]),
    "convnext": Kind(ConvNextTower, convnext_features, lambda numbers: numbers["hidden_sizes"][-1]),
    "dinov2": Kind(dinov2, dinov2_features, lambda numbers: 4 * numbers["hidden_size"]),
}
