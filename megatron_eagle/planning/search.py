"""The best layouts for a number of GPUs: every sensible combination is planned, the fastest that fit are kept.

Varied: tensor, pipeline (also interleaved) and context parallelism, recomputation, where the encoders are, how many
tiles they take at a time, and the layers of each pipeline stage, which are shared out so that stages take equally long.
The number of microbatches follows from the batch, which is the recipe's: a search must not change what is learned.
Memory is looked at first, because most combinations fail there and it is cheaper than time.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import check_layout, tokens_per_tile
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.errors import UserError
from megatron_eagle.planning.activations import Activations, PackShape
from megatron_eagle.planning.hardware import Hardware
from megatron_eagle.planning.memory import ProcessRanks, memory_of
from megatron_eagle.planning.plan import StagePlan, plan_stage
from megatron_eagle.planning.samples import Samples
from megatron_eagle.planning.timing import Timing

SIZES = (1, 2, 4, 8)
RECOMPUTE = ("none", "selective", "full", "offload")
TILES_AT_A_TIME = (None, 8)
SHORTEST_SHARE = 2048  # tokens of a pack that context parallelism leaves to a process; less is not worth its exchange


def search(
    recipe: Recipe, stage: Stage, gpus: int, hardware: Hardware, mix: Samples, keep: int = 10
) -> list[StagePlan]:
    """The ``keep`` fastest layouts of ``stage`` on ``gpus`` GPUs that fit, best first; empty if none does."""
    best: list[StagePlan] = []
    recipe = recipe.with_kernels_on(hardware.device)
    for layout, recompute in candidates(recipe, stage, gpus, hardware, mix):
        variant = with_layout(recipe, stage, layout, recompute)
        try:
            plan = plan_stage(variant, variant.stage(stage.name), gpus, hardware, mix, simulated=1)
        except UserError:
            continue
        if plan.fits:
            best = sorted([*best, plan], key=lambda one: one.seconds)[:keep]
    return best


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


def with_layout(recipe: Recipe, stage: Stage, layout: Layout, recompute: Any) -> Recipe:
    """``recipe`` with another layout and recomputation for ``stage``."""
    stages = tuple(replace(s, layout=layout) if s.name == stage.name else s for s in recipe.stages)
    return replace(recipe, model=replace(recipe.model, recompute=recompute), stages=stages)


def candidates(
    recipe: Recipe, stage: Stage, gpus: int, hardware: Hardware, mix: Samples
) -> Iterator[tuple[Layout, str]]:
    """(layout, recompute) of everything worth timing: possible, and not refused by a look at its memory."""
    config = recipe.model.eagle()
    cost = tokens_per_tile(config)
    for layout in _layouts(gpus, stage.pack_length):
        replicas = gpus // layout.model_parallel_size
        if stage.batch % replicas:
            continue
        packs, _ = mix.packs(min(stage.batch // replicas, 64), stage.pack_length, cost)
        for recompute in RECOMPUTE:
            balanced = _balance(recipe, stage, layout, recompute, hardware, packs[0])
            try:
                check_layout(config, balanced)
                balanced.check_pack_length(stage.pack_length)
            except ValueError:
                break
            variant = with_layout(recipe, stage, balanced, recompute)
            first = memory_of(variant, variant.stage(stage.name), gpus, ProcessRanks(0), packs)
            if first.peak <= hardware.usable_bytes:
                yield balanced, recompute


def _layouts(gpus: int, pack_length: int) -> Iterator[Layout]:
    for tp in SIZES:
        for cp in (size for size in SIZES if size == 1 or pack_length // size >= SHORTEST_SHARE):
            for pp in SIZES:
                if gpus % (tp * pp * cp):
                    continue
                for vpp in (None, 2) if pp > 1 else (None,):
                    shape: dict[str, Any] = {"tp": tp, "pp": pp, "cp": cp, "vpp": vpp, "sequence_parallel": tp > 1}
                    yield Layout(**shape)
                    for chunk in TILES_AT_A_TIME:
                        yield Layout(**shape, encoder="spread", encoder_chunk=chunk)


def _balance(
    recipe: Recipe, stage: Stage, layout: Layout, recompute: Any, hardware: Hardware, pack: PackShape
) -> Layout:
    """``layout`` with layers shared out so that the slowest stage is as fast as it can be."""
    count, layers = layout.pp * (layout.vpp or 1), recipe.model.eagle().language.num_hidden_layers
    if count == 1 or layers < count:
        return layout
    sizes = replace(Activations.of(recipe, stage), layout=layout, recompute=recompute)
    timing = Timing(sizes, hardware)
    layer, head, tiles = timing.layer(pack), timing.head(pack), timing.tiles(pack.tiles)
    loads = [0.0] * count
    loads[-1] += head.forward + head.backward
    if layout.encoder == "tensor":
        loads[0] += tiles.forward + tiles.backward
    given = [1] * count
    each = layer.forward + layer.backward
    for _ in range(layers - count):
        lightest = min(range(count), key=lambda number: loads[number] + given[number] * each)
        given[lightest] += 1
    return replace(layout, layers_per_stage=None if len(set(given)) == 1 else tuple(given))
