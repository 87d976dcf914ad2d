"""Stripes in plain PyTorch, which ``verify`` holds the module against."""

from typing import Any

from torch import Tensor, nn

from stripes.config import Config


def build(config: Config) -> nn.Module:
    return nn.Sequential(nn.Linear(3, config.channels))


def features(config: Config, module: nn.Module, pixels: Tensor) -> Tensor:
    return module(pixels.flatten(2).unflatten(2, (config.rows, -1)).mean(dim=3).transpose(1, 2))


def reference_name(name: str) -> str:
    return name.replace("stripes.", "0.")


def reduced(settings: dict[str, Any]) -> dict[str, Any]:
    return settings
