"""The plan of a run with LoRA: bytes and operations against what is measured, as for training all weights."""

import pytest
from eagle_cases import EAGLE, pack
from measured import recipe_of
from test_flops import count_operations
from test_memory import EVEN, RAGGED, compare

from megatron_eagle.compat.platform import install
from megatron_eagle.config.lora import LoraSettings
from megatron_eagle.config.presets import PRESETS
from megatron_eagle.dry_run.walk import dry_run
from megatron_eagle.errors import UserError
from megatron_eagle.model.cost import Parts
from megatron_eagle.model.flops import Work, step_flops
from megatron_eagle.planning.memory import ProcessRanks, persistent

install()

LORA = {"rank": 4, "alpha": 8, "targets": ["vision", "connector", "language"]}
LANGUAGE = {"rank": 8, "alpha": 8, "dropout": 0.1}
SIGLIP, CONVNEXT = PRESETS["tiny"].encoders
DEEPER = [SIGLIP, {**CONVNEXT, "depths": [2, 1, 2, 1]}]  # as in real ones, several blocks in the first stage
CASES = {
    1: [
        ({}, {"lora": LORA}, EVEN),
        ({}, {"lora": LORA, "recompute": "full", "encoders": DEEPER}, EVEN),
        ({}, {"lora": LANGUAGE, "trainable": ["language"], "precision": "bf16"}, EVEN),
        ({}, {"lora": {**LANGUAGE, "targets": ["language.qkv", "language.fc2"]}, "trainable": ["language"]}, EVEN),
    ],
    2: [
        ({"tp": 2, "sequence_parallel": True}, {"lora": LORA, "recompute": "full"}, RAGGED),
        ({"pp": 2, "layers_per_stage": [1, 2], "encoder": "spread"}, {"lora": LORA}, RAGGED),
        ({"cp": 2}, {"lora": LANGUAGE, "trainable": ["language"]}, RAGGED),
        ({}, {"lora": LORA, "precision": "bf16"}, RAGGED),
        ({"tp": 2, "encoder": "spread"}, {"lora": LORA, "recompute": "selective"}, RAGGED),
    ],
}


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_bytes_of_every_process(worlds, size):
    for case in CASES[size][:2]:
        compare(worlds, size, *case)


@pytest.mark.long
@pytest.mark.parametrize("size", CASES)
def test_bytes_of_every_process_in_more_layouts(worlds, size):
    for case in CASES[size][2:]:
        compare(worlds, size, *case)


def test_operations_are_those_that_run(worlds):
    lora, trainable = LoraSettings(rank=4, targets=("language", "connector.fc1")), ("connector", "language")
    _, total = worlds(1).run(count_operations, trainable, EAGLE, lora)[0]
    planned = step_flops(EAGLE, Parts.of(trainable, lora), Work.computed(pack())).total
    assert planned == pytest.approx(total, rel=0.01)
    assert planned != pytest.approx(step_flops(EAGLE, Parts.of(trainable), Work.computed(pack())).total, rel=0.1)


def test_a_walk_holds_what_the_plan_says():
    recipe = recipe_of({"pp": 2, "layers_per_stage": [1, 2], "tp": 2, "sequence_parallel": True}, lora=LORA, batch=16)
    outcome = dry_run(recipe, recipe.stages[0], 4)
    assert outcome.equal and outcome.met > 10


def test_a_target_that_no_layer_has_is_refused():
    recipe = recipe_of({}, lora={**LORA, "targets": ["language", "vision.*.fc3", "connector", "vision"]})
    with pytest.raises(UserError, match=r"no layer is called vision\.\*\.fc3; adapters got connector\.fc1, "):
        persistent(recipe, recipe.stages[0], 1, ProcessRanks(0))
