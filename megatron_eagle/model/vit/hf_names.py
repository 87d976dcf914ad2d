"""Positions of a vision transformer on another grid of patches than they were learned on."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.errors import UserError
from megatron_eagle.model.hf_names import Changes, Infos, interpolate
from megatron_eagle.model.vit.config import VitConfig


def fit_positions(
    infos: Infos, patches: str, positions: str, settings: dict[str, Any], tile_size: int, default: VitConfig
) -> tuple[dict[str, Any], Changes]:
    """``settings`` for tiles of ``tile_size``, and the positions interpolated if that changes the grid.

    patches, positions: names of the first convolution's weight [c, 3, patch, patch] and of [..., tokens, c].
    """
    patch, shape = infos[patches].shape[-1], infos[positions].shape
    if tile_size % patch:
        raise UserError(f"tiles of {tile_size} pixels cannot be cut into {patches}, patches of {patch} pixels")
    numbers = {**settings, "image_size": tile_size}
    if tile_size == default.image_size:
        del numbers["image_size"]
    side, kept = tile_size // patch, default.class_tokens
    if shape[-2] == kept + side**2:
        return numbers, {}
    change = partial(_interpolate, kept=kept, side=side)
    return numbers, {positions: ((*shape[:-2], kept + side**2, shape[-1]), change)}


def _interpolate(positions: Tensor, kept: int, side: int) -> Tensor:
    """[..., kept + n*n, c] -> [..., kept + side*side, c]."""
    rows = positions.reshape(positions.shape[-2:])
    new = torch.cat([rows[:kept], interpolate(rows[kept:], side)])
    return new.view(*positions.shape[:-2], *new.shape)
