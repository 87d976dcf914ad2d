"""Stages of the small recipe, trained in the processes of a world, and what they leave behind."""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.config.recipe import load_recipe


def train(recipe_path: str, stage: str, runs: str, overrides: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Runs in every process of a world; returns this process's weights after the stage."""
    from datetime import timedelta

    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.loop import StageRun
    from megatron_eagle.training.run_folder import RunFolder

    recipe = load_recipe(Path(recipe_path), overrides)
    platform = install()
    chosen = recipe.stage(stage)
    groups = initialise(recipe.stage_layout(chosen), platform, timeout=timedelta(minutes=1))
    run = StageRun(recipe, chosen, RunFolder(Path(runs) / recipe.name), platform, groups)
    run.train()
    return {}


def answer(recipe_path: str, stage: str, runs: str, data: str, out: str, answer_tokens: int) -> None:
    """Runs in every process of a world: the answers of a stage's newest checkpoint to a data set, scored."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.evaluation.score import evaluate
    from megatron_eagle.training.run_folder import RunFolder

    recipe = load_recipe(Path(recipe_path))
    folder = RunFolder(Path(runs) / recipe.name)
    evaluate(recipe, recipe.stage(stage), folder, Path(data), Path(out), install(), answer_tokens)


def weights(recipe_path: str, stage: str, runs: str, overrides: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Runs in a world of one; every weight of a stage's newest checkpoint."""
    from datetime import timedelta

    from megatron_eagle.checkpoint.files import find_latest, load_weights
    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.engine import build_chunks
    from megatron_eagle.training.run_folder import RunFolder

    recipe = load_recipe(Path(recipe_path), overrides)
    platform = install()
    initialise(recipe.layout, platform, timeout=timedelta(minutes=1))
    models = build_chunks(recipe, recipe.layout, platform)
    if stage:
        checkpoint = find_latest(RunFolder(Path(runs) / recipe.name).stage_checkpoints(stage))
        load_weights(checkpoint, models)
    return {name: tensor.detach().clone() for name, tensor in models[0].named_parameters()}


def metrics(runs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / "small" / "metrics.jsonl").read_text().splitlines()]


def losses(runs: Path) -> list[tuple[str, int, float, str]]:
    return [(entry["stage"], entry["step"], entry["loss"], entry["sample_digest"]) for entry in metrics(runs)]


def train_and_watch(
    recipe_path: str, stage: str, runs: str, overrides: tuple[str, ...] = ()
) -> tuple[str, list[list[tuple[float, float]]]]:
    """``train``; what it said, and (learning rate, weight decay) of every parameter group as each update used them."""
    import contextlib
    import io
    from unittest import mock

    from megatron_eagle.training.engine import Engine

    used: list[list[tuple[float, float]]] = []
    update = Engine.update

    def watched(engine: Engine) -> float:
        norm = update(engine)
        used.append(sorted({(group["lr"], group["weight_decay"]) for group in engine.optimizer.param_groups}))
        return norm

    with mock.patch.object(Engine, "update", watched), contextlib.redirect_stdout(io.StringIO()) as said:
        train(recipe_path, stage, runs, overrides)
    return said.getvalue(), used
