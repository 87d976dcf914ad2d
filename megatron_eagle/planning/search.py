"""The best layouts for a number of GPUs: every sensible one is looked at, the fastest that fit are kept.

Varied: tensor, pipeline (also interleaved) and context parallelism, recomputation, where the encoders are, how many
tiles they take at a time, and the layers of each pipeline stage, which are shared out so that stages take equally long.
Where keeping everything does not fit, as few layers of each stage are computed again as must be. The number of
microbatches follows from the batch, which is the recipe's: a search must not change what is learned.

To plan a layout is dear, to say what it cannot beat is cheap (``least.py``). So they are planned in the order of that
time, and when it is more than the slowest kept plan takes, so do all that are left. The result is that of planning
every one (``tests/planning/test_search.py``).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import check_layout, tokens_per_tile
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.errors import UserError
from megatron_eagle.planning.activations import Activations
from megatron_eagle.planning.hardware import Hardware
from megatron_eagle.planning.least import Least
from megatron_eagle.planning.memory import ProcessRanks, memory_of, persistent
from megatron_eagle.planning.plan import StagePlan, draw_replicas, fullest_of, plan_stage
from megatron_eagle.planning.samples import Samples
from megatron_eagle.planning.timing import Timing

SIZES = (1, 2, 4, 8)
VIRTUAL = (None, 2, 4)
RECOMPUTE = ("none", "selective", "full", "offload")
LAYERS_AGAIN = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24)  # of a pipeline stage, where it has more
TILES_AT_A_TIME = (None, 8)
SHORTEST_SHARE = 2048  # tokens of a pack that context parallelism leaves to a process; less is not worth its exchange


@dataclass(frozen=True)
class Candidate:
    """A layout and what it computes again (``ModelSettings``). least: seconds that its step takes at the least."""

    least: float
    layout: Layout
    recompute: str
    layers: int | None = None

    def of(self, recipe: Recipe, stage: Stage) -> Recipe:
        """``recipe`` with this for ``stage``; ValueError if it cannot be."""
        return with_layout(recipe, stage, self.layout, self.recompute, self.layers)


def search(
    recipe: Recipe, stage: Stage, gpus: int, hardware: Hardware, mix: Samples, keep: int = 10
) -> list[StagePlan]:
    """The ``keep`` fastest layouts of ``stage`` on ``gpus`` GPUs that fit, best first; empty if none does."""
    best: list[StagePlan] = []
    recipe = recipe.with_kernels_on(hardware.device)
    keeping_more: set[Layout] = set()  # layouts that fit with fewer layers computed again
    for one in sorted(candidates(recipe, stage, gpus, hardware, mix), key=lambda one: one.least):
        if len(best) == keep and one.least >= best[-1].seconds:
            break
        if one.layers and one.layout in keeping_more:
            continue
        plan = planned(one, recipe, stage, gpus, hardware, mix)
        if plan:
            best = sorted([*best, plan], key=lambda each: each.seconds)[:keep]
            keeping_more |= {one.layout} if one.layers or one.recompute == "none" else set()
    return best


def planned(
    one: Candidate, recipe: Recipe, stage: Stage, gpus: int, hardware: Hardware, mix: Samples
) -> StagePlan | None:
    """The plan of a candidate, None if it is impossible or does not fit; the first pipeline stage is asked first."""
    try:
        variant = one.of(recipe, stage)
        own = variant.stage(stage.name)
        if sum(persistent(variant, own, gpus, ProcessRanks(0))[:3]) > hardware.usable_bytes:
            return None
        replicas, cost = one.layout.data_parallel_size(gpus), tokens_per_tile(recipe.model.eagle())
        drawn, _ = draw_replicas(own, replicas, mix, cost, simulated=1)
        if memory_of(variant, own, gpus, ProcessRanks(0), fullest_of(drawn)).peak > hardware.usable_bytes:
            return None
        plan = plan_stage(variant, own, gpus, hardware, mix, simulated=1)
    except (UserError, ValueError):
        return None
    return plan if plan.fits else None


def nearest(recipe: Recipe, stage: Stage, gpus: int, hardware: Hardware, mix: Samples) -> StagePlan | None:
    """The fastest plan that fits with the fewest changes of ``stage``'s layout; None if three are not enough.

    A change doubles tensor or context parallelism, or copies the encoders to all processes, whole or eight tiles at a
    time. What is recomputed is the whole recipe's and stays.
    """
    layout, recipe = recipe.stage_layout(stage), recipe.with_kernels_on(hardware.device)
    for count in range(1, 4):
        fitting = []
        for changed in _changed(layout, count):
            try:
                variant = with_layout(recipe, stage, changed, recipe.model.recompute)
                plan = plan_stage(variant, variant.stage(stage.name), gpus, hardware, mix, simulated=1)
            except (UserError, ValueError):
                continue
            fitting += [plan] if plan.fits else []
        if fitting:
            return min(fitting, key=lambda plan: plan.seconds)
    return None


def _changed(layout: Layout, count: int) -> Iterator[Layout]:
    """Layouts that differ from ``layout`` by ``count`` changes."""
    tensor: dict[str, Any] = {"tp": layout.tp * 2, "sequence_parallel": True}
    changes: list[dict[str, Any]] = [tensor, {"cp": layout.cp * 2}]
    if layout.encoder == "tensor":
        changes += [{"encoder": "spread"}, {"encoder": "spread", "encoder_chunk": 8}]
    elif layout.encoder_chunk is None:
        changes += [{"encoder_chunk": 8}]
    for some in combinations(changes, count):
        together = {name: value for change in some for name, value in change.items()}
        if len(together) == sum(map(len, some)):  # two that set the same are one change, made twice
            yield replace(layout, **together)


def with_layout(recipe: Recipe, stage: Stage, layout: Layout, recompute: Any, layers: int | None = None) -> Recipe:
    """``recipe`` with another layout and recomputation for ``stage``. layers: computed again of each pipeline stage."""
    stages = tuple(replace(s, layout=layout) if s.name == stage.name else s for s in recipe.stages)
    return replace(recipe, model=replace(recipe.model, recompute=recompute, recompute_layers=layers), stages=stages)


def candidates(recipe: Recipe, stage: Stage, gpus: int, hardware: Hardware, mix: Samples) -> Iterator[Candidate]:
    """Everything that the model and the batch allow; whether it fits is not asked."""
    config = recipe.model.eagle()
    cost = tokens_per_tile(config)
    sizes = Activations.of(recipe, stage)
    for layout in _layouts(gpus, stage.pack_length):
        replicas = gpus // layout.model_parallel_size
        if stage.batch % replicas:
            continue
        drawn, _ = draw_replicas(stage, replicas, mix, cost, simulated=1)
        least = Least(Timing(replace(sizes, layout=layout), hardware), drawn[0])
        for recompute in RECOMPUTE:
            balanced = least.balanced(recompute)
            try:
                check_layout(config, balanced)
                balanced.check_pack_length(stage.pack_length)
            except ValueError:
                break
            yield Candidate(least.seconds(balanced, recompute), balanced, recompute)
            if recompute == "none":
                largest = max(least.layers(balanced))
                for layers in (layers for layers in LAYERS_AGAIN if layers < largest):
                    yield Candidate(least.seconds(balanced, "full", layers), balanced, "full", layers)


def _layouts(gpus: int, pack_length: int) -> Iterator[Layout]:
    for tp in SIZES:
        for cp in (size for size in SIZES if size == 1 or pack_length // size >= SHORTEST_SHARE):
            for pp in SIZES:
                if gpus % (tp * pp * cp):
                    continue
                for vpp in VIRTUAL if pp > 1 else (None,):
                    shape: dict[str, Any] = {"tp": tp, "pp": pp, "cp": cp, "vpp": vpp, "sequence_parallel": tp > 1}
                    yield Layout(**shape)
                    for chunk in TILES_AT_A_TIME:
                        yield Layout(**shape, encoder="spread", encoder_chunk=chunk)
