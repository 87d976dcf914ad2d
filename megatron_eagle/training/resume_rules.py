"""What a stage that continues takes from its checkpoint, what from the recipe given, and which changes it refuses.

From the checkpoint come weights, the optimizer's moments, the step, the random states and the position in the data. All
else is the recipe's, as it is given now: steps, warm-up, decay, rates, weight decay. A checkpoint carries the recipe it
was trained with as ``recipe_values``, and what differs is either refused or said, never passed over. One table decides.

What is decided elsewhere, by content and not by key: the model (``checkpoint.files.require_same_model``), and data,
tokenizer, seed and everything that orders packs (the position in the data refuses to be another stream's). Whatever
they take is said here.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.files import Description
from megatron_eagle.config.recipe import Recipe, Stage, recipe_as_data
from megatron_eagle.errors import UserError

LONGEST_VALUE = 60  # characters of a value in a line
NOTHING = "(nothing)"  # a key that one side does not have

# ``stage.`` is the stage that continues. A key that is not here may change, and is said.
REFUSED = {
    "stage.trainable": "the optimizer has moments of these parts only",
    "stage.freeze": "the optimizer has moments of the other weights only",
    "stage.new_rows_from": "the optimizer has moments of the other rows",
    "lora.rank": "the adapters have this shape",
    "lora.targets": "these layers have adapters",
    "lora.alpha": "the adapters were trained with this scale",
    "lora.rslora": "the adapters were trained with this scale",
    "stage.loss_normaliser": "the moments are those of the other objective",
}
# These two may change as long as the optimizer finds its own copy of the weights (``_master_weights``).
MASTER_WEIGHTS = {
    "precision": "the optimizer's own copy of the weights would be lost",
    "optimizer.distributed": "the optimizer's own copy of the weights would be lost",
}
BASE = "model.initial_weights"
WITHOUT_EFFECT = {
    BASE: "the weights are the checkpoint's",
    "lora.initial": "the adapters are the checkpoint's",
}
# The numbers that follow from these are compared, not how a recipe writes them.
MODEL = ("model.preset", "model.tile_size", "model.encoders", "model.language")


def recipe_values(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """Every value of ``recipe`` that can concern ``stage``, by dotted key as an override names it; plain data.

    ``layout`` is the one the stage has. The other stages are left out.
    """
    data = recipe_as_data(recipe)
    own = data.pop("stages")[recipe.stages.index(stage)]
    data["layout"] = own.pop("layout") or data["layout"]
    if recipe.lora is None:
        del data["lora"]
    if recipe.fp8 is None:
        del data["fp8_recipe"]
    return dict([*_flat(data, ""), *_flat(own, f"stages.{stage.name}.")])


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Leaves by dotted key; a list of mappings is counted, any other list is one value."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(number): item for number, item in enumerate(value)}
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}{name}.")
    else:
        yield prefix.removesuffix("."), value


def changes(description: Description, recipe: Recipe, stage: Stage) -> list[str]:
    """What differs between the recipe of a checkpoint and the one given: "stages.s1.steps 4 -> 8", sorted by key.

    Nothing if the checkpoint was written before checkpoints kept their recipe.
    """
    saved, given = description.recipe, recipe_values(recipe, stage)
    lines: list[str] = []
    for key in sorted(saved.keys() | given.keys()) if saved else ():
        if saved.get(key, NOTHING) != given.get(key, NOTHING) and not _in(MODEL, key):
            line = f"{key} {_shown(saved.get(key, NOTHING))} -> {_shown(given.get(key, NOTHING))}"
            why = None if recipe.lora and key == BASE else WITHOUT_EFFECT.get(_table_key(key, stage.name))
            lines.append(f"{line} (no effect: {why})" if why else line)
    return lines


def require_continuable(checkpoint: Path, description: Description, recipe: Recipe, stage: Stage) -> None:
    """Raise a UserError, one line with the old and the new values, if ``recipe`` cannot go on from ``checkpoint``."""
    if description.step > stage.steps:
        raise UserError(
            f"{checkpoint} is at step {description.step}, stage '{stage.name}' has only {stage.steps} steps "
            f"(it had {description.steps})"
        )
    if bool(description.base) != (recipe.lora is not None):
        kinds = ("LoRA's adapters", "whole models")
        here, there = kinds if description.base else kinds[::-1]
        raise UserError(f"{checkpoint} holds {here}, the recipe trains {there}: start a stage or a run of its own")
    saved, given = description.recipe, recipe_values(recipe, stage)
    fp32 = saved.get("precision") == given["precision"] == "fp32"
    needed = None if fp32 and not given["optimizer.distributed"] else _master_weights(given)
    rules = REFUSED if needed in (None, _master_weights(saved)) else REFUSED | MASTER_WEIGHTS
    refused = [
        f"{key} is {_shown(saved[key])} there, {_shown(given[key])} in the recipe: {why}"
        for key in sorted(saved.keys() & given.keys())
        if saved[key] != given[key] and (why := rules.get(_table_key(key, stage.name)))
    ]
    if refused:
        raise UserError(
            f"{checkpoint} cannot be continued: {'; '.join(refused)}; give the old value, or start a stage or a run of "
            "its own from these weights"
        )


def _master_weights(values: dict[str, Any]) -> str:
    """By which of Megatron's optimizers the float32 weights are kept, each under a name of its own.

    The distributed optimizer keeps them in either precision; the other one only where the model's are bf16.
    """
    if values.get("optimizer.distributed"):
        return "distributed"
    return "bf16" if values.get("precision") == "fp8" else str(values.get("precision"))


def _table_key(key: str, stage_name: str) -> str:
    prefix = f"stages.{stage_name}."
    return f"stage.{key.removeprefix(prefix)}" if key.startswith(prefix) else key


def _in(names: tuple[str, ...], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _shown(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable() and value and " " not in value
    text = value if plain else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
