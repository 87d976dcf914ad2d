"""Stripes in the code that an exported model carries."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Stripes(nn.Module):
    def __init__(self, rows: int, channels: int) -> None:
        super().__init__()
        self.rows = rows
        self.stripes = nn.Linear(3, channels)


def build(numbers: Mapping[str, Any], attention: str | None) -> nn.Module:
    return Stripes(numbers["rows"], numbers["channels"])


def features(module: Any, pixels: Tensor) -> Tensor:
    colours = (pixels / 2 + 0.5).flatten(2).unflatten(2, (module.rows, -1)).mean(dim=3).transpose(1, 2)
    return module.stripes(colours.to(module.stripes.weight.dtype))


def channels(numbers: Mapping[str, Any]) -> int:
    return int(numbers["channels"])
