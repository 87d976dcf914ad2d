"""The newest checkpoint of a stage, loaded to be asked: without optimizer, in whatever layout the processes have."""

from dataclasses import replace
from pathlib import Path

from megatron.core.transformer.module import Float16Module

from megatron_eagle.checkpoint.files import (
    find_latest,
    load_weights,
    read_description,
    require_same_model,
)
from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.model.lora import pack_base
from megatron_eagle.training.adapters import base_checkpoint, load_base, require_fitting
from megatron_eagle.training.engine import build_chunks
from megatron_eagle.training.run_folder import RunFolder

EMA_WORDS = ", its running mean"  # behind the name of a checkpoint of which that is asked


def evaluation_layout(recipe: Recipe, stage: Stage) -> Layout:
    """The stage's layout as evaluation runs it; UserError if it cannot.

    Tiles are encoded pack by pack where they are embedded; checkpoints of spread encoders load there as well.
    """
    layout = recipe.stage_layout(stage)
    if layout.vpp:
        raise UserError(f"evaluation runs without virtual pipeline stages; add stages.{stage.name}.layout.vpp=null")
    return replace(layout, encoder="tensor", encoder_chunk=None)


def newest_checkpoint(recipe: Recipe, stage: Stage, run_folder: RunFolder) -> Path:
    """The stage's newest; UserError if it has none, or it is of another model."""
    folder = run_folder.stage_checkpoints(stage.name)
    checkpoint = find_latest(folder)
    if checkpoint is None:
        raise UserError(f"stage '{stage.name}' has no checkpoint in {folder}")
    require_same_model(checkpoint, read_description(checkpoint), recipe.model.eagle())
    return checkpoint


def model_to_ask(recipe: Recipe, stage: Stage, run_folder: RunFolder, *, before: bool) -> tuple[Recipe, Path]:
    """The stage's newest checkpoint or, with ``before``, what the stage starts from; and the recipe to load it by.

    New adapters change nothing, so before a stage that starts with some the base is asked, without ``lora``.
    UserError if there is none: ``newest_checkpoint``, or the stage starts from random weights.
    """
    if not before:
        return recipe, newest_checkpoint(recipe, stage, run_folder)
    checkpoint = run_folder.weights_before(recipe, stage)
    if checkpoint is None and recipe.lora:
        recipe, checkpoint = replace(recipe, lora=None), base_checkpoint(recipe)
    if checkpoint is None:
        raise UserError(f"stage '{stage.name}' starts from random weights: there is nothing to ask before it")
    return recipe, checkpoint


def load_model(
    recipe: Recipe, checkpoint: Path, layout: Layout, platform: Platform, *, ema: bool = False
) -> EagleModel | Float16Module:
    """This process's part of the model in eval mode; its process groups must exist already.

    ema: with the running mean in place of the weights that trained; UserError if the checkpoint has none.
    """
    recipe = recipe.without_fp8()
    models = build_chunks(recipe, layout, platform)
    if recipe.lora:
        require_fitting(checkpoint, recipe.lora, load_base(base_checkpoint(recipe), models))
    load_weights(checkpoint, models, "adapters" if recipe.lora else "base", ema=ema)
    model: EagleModel | Float16Module = models[0]
    if recipe.weight_precision == "bf16":
        model = Float16Module(models[0].config, model)
    if recipe.lora and recipe.lora.base:
        pack_base([model])
    return model.eval()
