"""The base of a recipe with LoRA: loaded before the adapters, which belong to it alone."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from megatron_eagle.checkpoint.files import (
    load_weights,
    read_description,
    require_adapters,
    require_same_model,
    require_whole,
)
from megatron_eagle.checkpoint.safe_index import read_index
from megatron_eagle.checkpoint.sharded_state import EMA
from megatron_eagle.config.lora import LoraSettings, is_adapter, layer_name
from megatron_eagle.config.recipe import Recipe
from megatron_eagle.errors import UserError
from megatron_eagle.model.base_digest import base_digest
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.model.lora import adapted_layers, check_targets
from megatron_eagle.model.tile_encoder import TileEncoder


def base_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint of the recipe's base; None if the base is drawn from the seed. UserError if it is no base."""
    if recipe.model.initial_weights is None:
        return None
    checkpoint = Path(recipe.model.initial_weights)
    description = read_description(checkpoint)
    require_same_model(checkpoint, description, recipe.model.eagle())
    require_whole(checkpoint, description)
    return checkpoint


def load_base(checkpoint: Path | None, models: Sequence[EagleModel], copy: TileEncoder | None = None) -> str:
    """Give ``models``, and a copy of spread encoders, their base; its digest, the same on every process.

    None leaves what was drawn.
    """
    if checkpoint is not None:
        load_weights(checkpoint, [*models, *([copy] if copy else [])])
    return base_digest(models, parallel_state.get_model_parallel_group(), copy)


def require_fitting(checkpoint: Path, lora: LoraSettings, base: str) -> None:
    """UserError unless ``checkpoint`` holds adapters of the base with this digest that are a recipe's own; one process.

    Of layers that the checkpoint lacks loading speaks; those that the recipe lacks would be left out unseen.
    """
    description = read_description(checkpoint)
    require_adapters(checkpoint, description, base)
    for key in ("rank", "alpha", "rslora"):
        theirs, ours = description.lora.get(key), getattr(lora, key)
        if theirs != ours:
            raise UserError(f"{checkpoint} holds adapters with lora.{key}={theirs}, the recipe says {ours}")
    names = [name for name in read_index(checkpoint).state_dict_metadata if is_adapter(name)]
    stored = {layer_name(name.rpartition(".")[0]) for name in names if not name.startswith(("optimizer.", EMA))}
    if left := sorted(layer for layer in stored if layer and not lora.wants(layer)):
        raise UserError(f"{checkpoint} holds adapters of {', '.join(left)}, which the recipe's lora.targets leave out")


def require_targets(lora: LoraSettings, modules: Sequence[MegatronModule]) -> None:
    """UserError, on every process, names the first target that no layer of the whole model has."""
    everywhere: list[Collection[str]] = [()] * dist.get_world_size()
    dist.all_gather_object(everywhere, {layer for module in modules for layer in adapted_layers(module)})
    check_targets(lora, {layer for layers in everywhere for layer in layers})
