"""LoRA on a base in NF4: the same as on the unpacked numbers, to the bit, and the memory that the plan says."""

from dataclasses import replace
from datetime import timedelta
from unittest import mock

import pytest
import torch
from measured import packs_of, recipe_of
from test_memory import EVEN, RAGGED, compare

from megatron_eagle.compat.platform import install
from megatron_eagle.config.lora import BLOCK
from megatron_eagle.config.recipe import Recipe
from megatron_eagle.dry_run.walk import dry_run
from megatron_eagle.errors import UserError
from megatron_eagle.model.packed_base import require_packing
from megatron_eagle.parallel.groups import initialise
from megatron_eagle.training.engine import Engine, build_engine
from megatron_eagle.training.step import Step

LORA = {"rank": 4, "alpha": 8, "targets": ["language", "connector", "vision"], "base": "nf4"}
# The fewest that show each: bf16; a layer's columns cut and rows cut, recomputed; every process a copy of the encoders.
CASES = {
    "one": (1, {}, {"precision": "bf16"}, EVEN),
    "tp": (2, {"tp": 2, "sequence_parallel": True}, {"recompute": "full"}, RAGGED),
    "pp, spread": (2, {"pp": 2, "layers_per_stage": [1, 2], "encoder": "spread"}, {}, RAGGED),
}
WIDEST = (1 - 0.6961928) / 2  # half of the largest gap between NF4's values, where a block's largest number is 1


def stepped(engine: Engine, recipe: Recipe, groups) -> tuple[float, float, list[torch.Tensor]]:
    """Loss, gradients' norm and adapters' gradients of a step."""
    step = Step(engine, groups, recipe.stages[0], torch.device("cpu"))
    packs = packs_of(recipe, *RAGGED)[groups.dp_rank :: groups.dp_size]
    loss = float(engine.forward_backward(step.normalise(step.run(lambda: packs).batches)))
    owners = [module for module, _ in engine.weight_owners()]
    gradients = [p.main_grad.clone() for module in owners for p in module.parameters() if p.requires_grad]
    return loss, engine.update(), gradients


def rounding(weight: torch.Tensor, numbers: torch.Tensor) -> float:
    """The largest distance between two of the same place, of the largest number of the block."""
    blocks = [torch.nn.functional.pad(t.float().flatten(), (0, -t.numel() % BLOCK)) for t in (weight, numbers)]
    ours, theirs = (block.view(-1, BLOCK) for block in blocks)
    return float(((ours - theirs).abs().amax(1) / ours.abs().amax(1)).max())


def both(recipe: Recipe) -> tuple[bool, bool, list[float], bool]:
    """In every process: whether losses and gradients are equal; layers' roundings; whether a weight shows outside."""
    plain = replace(recipe, lora=replace(recipe.lora, base=None))
    platform = install()
    groups = initialise(recipe.layout, platform, timeout=timedelta(minutes=1))
    packed, unpacked = (build_engine(one, one.stages[0], platform, groups) for one in (recipe, plain))
    for engine in (packed, unpacked):  # which does nothing to the second
        engine.pack_base()
    distances, shown = [], False
    for (ours, _), (theirs, _) in zip(packed.weight_owners(), unpacked.weight_owners(), strict=True):
        for one, other in zip(ours.modules(), theirs.modules(), strict=True):
            if getattr(one, "packed", None):
                shown |= not bool(one.weight.isnan().all())
                numbers = one.packed.unpacked(one.weight)
                distances.append(rounding(other.weight, numbers))
                other.weight.data.copy_(numbers)
    (*sizes, gradients), (*wanted, theirs) = (
        stepped(engine, one, groups) for engine, one in ((packed, recipe), (unpacked, plain))
    )
    equal = all(map(torch.equal, gradients, theirs)) and any(bool(g.any()) for g in gradients)
    return sizes == wanted, equal, distances, shown


@pytest.mark.parametrize("case", [pytest.param("one", marks=pytest.mark.long), *list(CASES)[1:]])
def test_a_step_is_that_on_the_unpacked_numbers_to_the_bit(worlds, case: str) -> None:
    pytest.importorskip("bitsandbytes")
    size, layout, changes, _ = CASES[case]
    for losses, gradients, distances, shown in worlds(size).run(both, recipe_of(layout, lora=LORA, **changes)):
        assert losses and gradients and not shown
        assert len(distances) > 3 and 0.1 < max(distances) < WIDEST + 2**-8


@pytest.mark.parametrize("case", CASES)
def test_bytes_of_every_process(worlds, case: str) -> None:
    pytest.importorskip("bitsandbytes")
    size, layout, changes, packs = CASES[case]
    compare(worlds, size, layout, {"lora": LORA, **changes}, packs)


def test_what_cannot_be_packed_is_refused_in_a_line() -> None:
    recipe = recipe_of({}, lora=LORA)
    with pytest.raises(UserError, match=r"lora\.base: nf4 packs numbers, which a dry run has none of"):
        dry_run(recipe, recipe.stages[0], 1)
    missing = mock.patch("importlib.util.find_spec", return_value=None)
    with missing, pytest.raises(UserError, match="needs bitsandbytes, which is not installed"):
        require_packing()
    with pytest.raises(ValueError, match="precision: fp8 and lora"):
        recipe_of({}, lora=LORA, precision="fp8")
