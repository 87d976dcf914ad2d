"""What a training process really holds, measured inside worlds: bytes by kind, and the peak of a step."""

import copy
from datetime import timedelta
from typing import Any

import torch
from pydantic import TypeAdapter

from megatron_eagle.compat.platform import install
from megatron_eagle.config.recipe import Recipe
from megatron_eagle.measuring.accounting import TensorAccounting, held_bytes, storage_bytes
from megatron_eagle.parallel.groups import initialise
from megatron_eagle.training.engine import build_engine
from megatron_eagle.training.step import Step

SETTINGS: dict[str, Any] = {
    "name": "planned",
    "model": {"preset": "tiny"},
    "tokenizer": {"kind": "sentencepiece", "path": "none"},
    "precision": "fp32",
    "log": {"tensorboard": False},
    "stages": [
        {
            "name": "all",
            "trainable": ["vision", "connector", "language"],
            "steps": 4,
            "pack_length": 512,
            "batch": 4,
            "learning_rate": 1e-3,
            "blend": [{"path": "none"}],
        }
    ],
}


def recipe_of(layout: dict[str, Any], **changes: Any) -> Recipe:
    settings = copy.deepcopy(SETTINGS) | {"layout": layout}
    for key, value in changes.items():
        if key in ("trainable", "batch", "pack_length", "freeze", "neftune_alpha", "ema", "new_rows_from"):
            settings["stages"][0][key] = value
        elif key in ("recompute", "recompute_layers", "language", "encoders"):
            settings["model"][key] = value
        elif key in ("distributed", "overlap"):
            settings.setdefault("optimizer", {})[key] = value
        else:
            settings[key] = value
    return TypeAdapter(Recipe).validate_python(settings)


def packs_of(recipe: Recipe, lengths: list[list[int]], tiles: list[int]) -> list[Any]:
    """One pack for each entry: segments of ``lengths``, the rest padding; the tiles stand one behind another."""
    from megatron_eagle.config.model import tokens_per_tile
    from megatron_eagle.data.sample.assemble import Segment, assemble_pack

    config = recipe.model.eagle()
    cost, side = tokens_per_tile(config), config.tile_size
    packs = []
    for sizes, count in zip(lengths, tiles, strict=True):
        segments = []
        for number, size in enumerate(sizes):
            own = count if number == 0 else 0
            assert own * cost <= size
            tokens = torch.arange(size) % 100 + 1
            segments.append(
                Segment(
                    str(number),
                    tokens,
                    tokens.clone(),
                    torch.arange(own) * cost,
                    torch.zeros(own, 3, side, side, dtype=torch.uint8),
                )
            )
        packs.append(assemble_pack(segments, recipe.stages[0].pack_length, 0))
    return packs


def measure(recipe: Recipe, lengths: list[list[int]], tiles: list[int]) -> dict[str, int]:
    """Runs in every process of a world: two steps, the second one under account."""
    platform = install()
    stage = recipe.stages[0]
    groups = initialise(recipe.stage_layout(stage), platform, timeout=timedelta(seconds=60))
    engine = build_engine(recipe, stage, platform, groups)
    engine.pack_base()
    own = slice(groups.dp_rank, None, groups.dp_size)
    step = Step(engine, groups, stage, platform.device)
    batches = step.normalise(step.run(lambda: packs_of(recipe, lengths, tiles)[own]).batches)
    with TensorAccounting() as seen:
        engine.forward_backward(batches)
        train_peak = seen.peak
        start = seen.peak = seen.live
        engine.update()
    return {
        **held_bytes(engine),
        "inputs": storage_bytes(t for batch in batches for t in vars(batch).values() if torch.is_tensor(t)),
        "activations": train_peak,
        "left": start,
        "update": seen.peak,
    }
