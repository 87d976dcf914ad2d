"""What the tests of spread encoders run in every process of a world: a few steps of training on ragged packs."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from eagle_cases import EAGLE, pack
from torch import Tensor

from megatron_eagle.compat.torch_dispatch import TorchDispatchMode, group_of
from megatron_eagle.config.data import BlendSource
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model_settings import ModelSettings
from megatron_eagle.config.recipe import OptimizerSettings, Part, Recipe, Stage, TokenizerSettings
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.model.weights import weight_slices

ALL: tuple[Part, ...] = ("vision", "connector", "language")
# Tiles of each of the four packs of a step: more than there are processes, fewer, one pack with all of them, none.
STEPS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((2, 20, 75), (30,), (), (0, 16, 32, 48, 64)),
    ((), (), (50,), ()),
    ((), (), (), ()),
    ((1, 17, 33, 49, 65, 81, 97), (), (), ()),
)


def make_step(number: int) -> list[PackedBatch]:
    return [pack(tile_slots=slots, seed=10 * number + place) for place, slots in enumerate(STEPS[number])]


@dataclass(frozen=True)
class Outcome:
    """losses, norms: of every step. weights: of the whole model after the last one, or how far off ``expected``."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    worst: float


def make_recipe(
    layout: Layout, trainable: tuple[Part, ...], optimizer: dict[str, Any], model: dict[str, Any]
) -> Recipe:
    stage = Stage(
        name="stage",
        trainable=trainable,
        steps=len(STEPS),
        pack_length=128,
        batch=4,
        learning_rate=1e-3,
        part_learning_rates={part: 3e-3 for part in trainable if part != "language"},
        blend=(BlendSource("none"),),
        warmup_fraction=0.0,
    )
    return Recipe(
        name="spread",
        model=ModelSettings(
            preset="tiny", tile_size=64, encoders=EAGLE.encoders, language=asdict(EAGLE.language), **model
        ),
        tokenizer=TokenizerSettings(kind="sentencepiece", path="none"),
        stages=(stage,),
        layout=layout,
        # Clipping is active in every step; eps is above the noise of gradients that are zero but for rounding.
        optimizer=OptimizerSettings(**{"eps": 1e-4, "beta2": 0.95, "clip_grad": 0.5, **optimizer}),
        precision="fp32",
    )


def train(
    layout: Layout,
    trainable: tuple[Part, ...] = ALL,
    expected: dict[str, Tensor] | None = None,
    optimizer: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    start: Path | None = None,
    stop: int = len(STEPS),
    save_to: Path | None = None,
) -> Outcome:
    """Steps up to ``stop``, from the checkpoint ``start`` or from the first; runs in every process of a world."""
    from datetime import timedelta

    from megatron_eagle.checkpoint import files as checkpoint
    from megatron_eagle.checkpoint.saver import Saver
    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.engine import build_engine
    from megatron_eagle.training.step import Step

    recipe = make_recipe(layout, trainable, optimizer or {}, model or {})
    platform = install()
    groups = initialise(layout, platform, timeout=timedelta(seconds=60))
    engine = build_engine(recipe, recipe.stages[0], platform, groups)
    first = 0
    if start is not None:
        description = checkpoint.read_description(start)
        checkpoint.load_training_state(start, description, engine.state(), groups)
        first = description.step
    step = Step(engine, groups, recipe.stages[0], platform.device)
    losses, norms = [], []
    for number in range(first, stop):
        own = make_step(number)[groups.dp_rank :: groups.dp_size]
        result = step.run(lambda own=own: own)
        losses.append(step.collect(result).loss)
        norms.append(result.grad_norm)
    if save_to is not None:
        description = checkpoint.Description("stage", stop, len(STEPS), asdict(EAGLE), asdict(layout), groups.dp_size)
        position = b"readers always have one" if groups.is_reader else None
        saver = Saver(save_to, groups, platform.device, keep=1)
        saver.start(description, engine.state(), position)
        saver.finish(must=True)
    weights, worst = {}, 0.0
    for module, group in engine.weight_owners():
        for weight in weight_slices(module, group):
            if expected is None:
                weights[weight.name] = weight.parameter.detach().clone()
            else:
                whole = expected[weight.name]
                off = (weight.parameter - weight.cut(whole)).norm() / whole.norm().clamp_min(1e-30)
                worst = max(worst, float(off))
    return Outcome(losses, norms, weights, worst)


class Recorder(TorchDispatchMode):
    """Notes every collective (not what is sent from one process to one other) with the members of its group."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "c10d" and name.split(".")[0] not in ("send", "recv_", "recv_any_source_"):
            self.calls.append((name, tuple(dist.get_process_group_ranks(group_of(args)))))
        return func(*args, **(kwargs or {}))


def record(layout: Layout, options: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Every collective of a short training, in order."""
    with Recorder() as recorder:
        train(layout, **options)
    return recorder.calls


def with_spread(layout: Layout, **changes: Any) -> Layout:
    return replace(layout, encoder="spread", **changes)
