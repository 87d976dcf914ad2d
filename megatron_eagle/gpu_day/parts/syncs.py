"""A training step waits for the device once, when it fetches its numbers, and in Megatron's optimizer."""

from collections import Counter
from datetime import timedelta

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import tokens_per_tile
from megatron_eagle.gpu_day.alone import NO_CUDA, alone, synchronisations
from megatron_eagle.gpu_day.part import PartResult, Setting, Table
from megatron_eagle.gpu_day.sizes import EAGLE_1B, mix
from megatron_eagle.parallel.groups import initialise
from megatron_eagle.planning.samples import synthetic
from megatron_eagle.training.engine import build_engine
from megatron_eagle.training.step import Step

EXPECTED = {"training/step_stats.py": 1}  # of ours; all others are Megatron's optimizer
OURS = "megatron_eagle/"


def run(setting: Setting) -> PartResult:
    """The second step of a training, on packs with and without tiles."""
    recipe, device = EAGLE_1B.recipe(setting.toy), setting.platform.device
    stage, config = recipe.stages[0], recipe.model.eagle()
    cost = tokens_per_tile(config)
    shapes, _ = mix(setting.toy).packs(stage.batch, stage.pack_length, cost)
    own = [synthetic(shape, config.tile_size, cost) for shape in shapes]
    with alone(setting.platform):
        groups = initialise(Layout(), setting.platform, timeout=timedelta(minutes=1))
        step = Step(build_engine(recipe, stage, setting.platform, groups), groups, stage, device)
        step.collect(step.run(lambda: own))  # makes Adam's moments and pins memory
        with synchronisations(device) as seen:
            step.collect(step.run(lambda: own))
    if seen is None:
        return PartResult(skipped=(f"waits of a step, which ran: {NO_CUDA}",))
    return judged(seen)


def judged(seen: Counter[str]) -> PartResult:
    """``seen``: how often the host waited, by "file:line"."""
    ours: Counter[str] = Counter()
    for where, count in seen.items():
        if f"/{OURS}" in where:
            ours[where.rpartition(f"/{OURS}")[2].rpartition(":")[0]] += count
    rows = tuple((where, str(count)) for where, count in sorted(seen.items()))
    unexpected = {where: count for where, count in ours.items() if count > EXPECTED.get(where, 0)}
    return PartResult(
        tables=(Table("Waits of the host for the device in one step", ("where", "times"), rows),),
        values=dict(seen),
        wrong=tuple(
            f"{where} waits {count} x, expected {EXPECTED.get(where, 0)}" for where, count in unexpected.items()
        ),
    )
