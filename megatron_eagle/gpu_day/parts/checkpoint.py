"""What a checkpoint costs the training beside it, resuming to the same bits, and hidden states on the host."""

import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from megatron_eagle.checkpoint.files import Description, find_latest, load_training_state, read_description
from megatron_eagle.checkpoint.saver import Saver
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import tokens_per_tile
from megatron_eagle.config.recipe import Recipe
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.gpu_day.alone import NO_CUDA, alone, now
from megatron_eagle.gpu_day.part import PartResult, Setting, Table
from megatron_eagle.gpu_day.sizes import EAGLE_1B, mix
from megatron_eagle.gpu_day.variants import bench_each
from megatron_eagle.parallel.groups import Groups, initialise
from megatron_eagle.planning.samples import synthetic
from megatron_eagle.training.engine import build_engine
from megatron_eagle.training.step import Step

BEFORE, AFTER = 3, 3  # steps
MOST_STEPS_BESIDE = 200  # of a save
OFFLOAD_STEPS, OFFLOAD_TOY_STEPS = 5, 1


def run(setting: Setting) -> PartResult:
    """The model is Eagle2-1B; its checkpoint is removed again."""
    recipe = EAGLE_1B.recipe(setting.toy)
    checkpoints = setting.folder / "checkpoint-part"
    shutil.rmtree(checkpoints, ignore_errors=True)
    try:
        saved, wrong = _save_and_resume(setting, recipe, checkpoints)
    finally:
        shutil.rmtree(checkpoints, ignore_errors=True)
    offload, values, off_wrong = _offload(setting)
    skipped = () if setting.cuda else (f"pinned copies of hidden states: {NO_CUDA}; plain ones were made",)
    return PartResult((saved, offload), values, skipped=skipped, wrong=(*wrong, *off_wrong))


@contextmanager
def _training(setting: Setting, recipe: Recipe) -> Iterator[tuple[Step, Groups, list[PackedBatch]]]:
    stage, config = recipe.stages[0], recipe.model.eagle()
    cost = tokens_per_tile(config)
    shapes, _ = mix(setting.toy).packs(stage.batch, stage.pack_length, cost)
    with alone(setting.platform):
        groups = initialise(Layout(), setting.platform, timeout=timedelta(minutes=5))
        engine = build_engine(recipe, stage, setting.platform, groups)
        own = [synthetic(shape, config.tile_size, cost) for shape in shapes]
        yield Step(engine, groups, stage, setting.platform.device), groups, own


def _save_and_resume(setting: Setting, recipe: Recipe, folder: Path) -> tuple[Table, list[str]]:
    device = setting.platform.device
    with _training(setting, recipe) as (step, groups, own):
        plain = [_timed(step, own) for _ in range(BEFORE)]
        saver = Saver(folder, groups, device, keep=1)
        started = now(device)
        saver.start(_description(recipe, step, BEFORE), step.engine.state(), b"none")
        saver.after_step()
        stall_at_start = now(device) - started
        beside: list[tuple[float, float]] = []
        while saver.pending and len(beside) < MOST_STEPS_BESIDE:
            beside.append(_timed(step, own))
            saver.after_step()
        saver.finish(must=True)
        total, stall = now(device) - started, saver.take_stall()
        while len(beside) < AFTER:
            beside.append(_timed(step, own))
        went_on = [loss for loss, _ in beside[:AFTER]]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    resumed = _resumed(setting, recipe, folder)
    usual, slowed = (statistics.median(seconds for _, seconds in steps) for steps in (plain[1:], beside))
    rows = (
        ("bytes, GB", f"{size / 1e9:.3f}"),
        ("training waited when it began, s", f"{stall_at_start:.3f}"),
        ("training waited in all, s", f"{stall:.3f}"),
        ("until it was there, s", f"{total:.2f}"),
        ("a step without and beside it, s", f"{usual:.3f} and {slowed:.3f}"),
        ("losses after resuming", "the same bits" if resumed == went_on else f"{resumed}, went on with {went_on}"),
    )
    worst = max(abs(a / b - 1) for a, b in zip(resumed, went_on, strict=True))
    wrong = (
        [] if resumed == went_on else [f"losses after resuming differ by up to {worst:.1e}: {resumed}, not {went_on}"]
    )
    return Table(f"A checkpoint of {recipe.name}, written beside training", ("", ""), rows), wrong


def _resumed(setting: Setting, recipe: Recipe, folder: Path) -> list[float]:
    """Losses of the next steps in a new engine that loaded the checkpoint."""
    with _training(setting, recipe) as (step, groups, own):
        checkpoint = find_latest(folder)
        assert checkpoint is not None
        load_training_state(checkpoint, read_description(checkpoint), step.engine.state(), groups)
        return [_timed(step, own)[0] for _ in range(AFTER)]


def _timed(step: Step, own: list[PackedBatch]) -> tuple[float, float]:
    """(loss, seconds) of one step."""
    started = now(step.device)
    loss = step.collect(step.run(lambda: own)).loss
    return loss, now(step.device) - started


def _description(recipe: Recipe, step: Step, number: int) -> Description:
    stage = recipe.stages[0]
    return Description(
        stage=stage.name,
        step=number,
        steps=stage.steps,
        model=asdict(recipe.model.eagle()),
        layout=asdict(recipe.layout),
        data_parallel_size=1,
        trainable_parameters=step.engine.trainable_parameters,
    )


def _offload(setting: Setting) -> tuple[Table, dict[str, object], list[str]]:
    """Whole layers recomputed, from hidden states on the device and on the host."""
    steps = OFFLOAD_TOY_STEPS if setting.toy else OFFLOAD_STEPS
    ways = {name: EAGLE_1B.recipe(setting.toy, recompute=name) for name in ("full", "offload")}
    runs = bench_each(setting, ways, steps)
    rows = tuple(
        (
            name,
            f"{statistics.median(one.seconds):.3f}",
            f"{one.peak_bytes / 1e9:.3f}",
            f"{one.predicted_bytes / 1e9:.3f}",
        )
        for name, one in runs.items()
    )
    header = ("recompute", "step, s", "peak of tensors, GB", "planned, GB")
    losses = {name: one.losses for name, one in runs.items()}
    wrong = [] if losses["full"] == losses["offload"] else [f"losses differ with hidden states on the host: {losses}"]
    return (
        Table("Hidden states kept on the host", header, rows),
        {"offload": {n: vars(r) for n, r in runs.items()}},
        wrong,
    )
