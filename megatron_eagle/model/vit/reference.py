"""What references of vision transformers share; written a second time, so that a mistake cannot be in both."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_eagle.model.vit.config import VitConfig


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[n, 3, s, s] in [0, 1], by the statistics of each channel."""
    means, stds = (pixels.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pixels - means) / stds


def shuffled(x: Tensor) -> Tensor:
    """[n, h*w, c] -> [n, h*w/4, 4c]: each 2 x 2 square of tokens becomes one, row by row."""
    side = round(x.shape[1] ** 0.5)
    squares = x.unflatten(1, (side // 2, 2, side // 2, 2))
    return squares.permute(0, 1, 3, 2, 4, 5).flatten(3, 5).flatten(1, 2)


def with_sizes(published: Any, config: VitConfig, others: Mapping[str, Any]) -> Any:
    """transformers' config with those of our numbers that the shapes of weights show, and with ``others``.

    A config.json may leave sizes out, and a new model may have another grid of positions.
    """
    names = ("hidden_size", "num_hidden_layers", "image_size", "patch_size")
    for name, value in ({name: getattr(config, name) for name in names} | dict(others)).items():
        setattr(published, name, value)
    return published


def reduced_vit(settings: dict[str, Any], default_heads: int) -> dict[str, Any]:
    """A recipe's entry at two layers and eight channels a head, with as many heads."""
    heads = settings.get("num_attention_heads", default_heads)
    return settings | {"hidden_size": 8 * heads, "intermediate_size": 16 * heads, "num_hidden_layers": 2}
