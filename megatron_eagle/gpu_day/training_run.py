"""Twenty steps of one model: ours against the plan, and beside the same model of transformers' modules."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_eagle.config.model import tokens_per_tile
from megatron_eagle.config.recipe import Recipe
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.gpu_day.alone import NO_CUDA, alone
from megatron_eagle.gpu_day.part import Chart, PartResult, Setting, Table
from megatron_eagle.gpu_day.sizes import Size, mix
from megatron_eagle.gpu_day.transformers_run import Run, packed_attention, packed_rows, padded_rows, train
from megatron_eagle.measuring.bench import Measurement, run_bench
from megatron_eagle.planning.samples import synthetic
from megatron_eagle.training.engine import Engine
from megatron_eagle.training.throughput import stated_peak, useful_flops
from megatron_eagle.verification.check import load_reference
from megatron_eagle.verification.reference import ReferenceEagle

STEPS, TOY_STEPS = 20, 2
THEIR_STEPS, THEIR_TOY_STEPS = 6, 1  # of each of transformers' ways
SEED = 7
LOSS_TOLERANCE = 1e-2  # relative, of the first step in bf16: verification's for one
MEMORY_TOLERANCE = 0.05  # peak of tensors against the plan


@dataclass(frozen=True)
class Trained:
    """What one way to train the model gave; None where this machine cannot tell."""

    name: str
    losses: list[float]
    seconds: float
    peak_bytes: int | None


def train_model(setting: Setting, size: Size) -> PartResult:
    """The part of one size: our run, its trace, transformers' two, and how they compare."""
    recipe = size.recipe(setting.toy)
    packs = _packs(recipe, setting)
    reference = _reference(recipe, "sdpa")
    ours = _ours(setting, recipe, reference)
    mine = Trained("megatron-eagle", ours.losses, statistics.median(ours.seconds), ours.peak_bytes)
    theirs, skipped = _theirs(setting, recipe, reference, packs)
    trained = [mine, *theirs]
    if not setting.cuda:
        skipped += [f"MFU, peak memory of transformers' runs: {NO_CUDA}"]
    elif stated_peak(setting.platform.device) is None:
        skipped += [f"MFU: no peak is stated for {torch.cuda.get_device_name()}"]
    return PartResult(
        tables=(_side_by_side(setting, recipe, packs, trained), _against_plan(ours)),
        values={"bench": vars(ours), "trained": [vars(one) for one in trained]},
        charts=(Chart(f"{recipe.name}: useful tokens a second", "tokens/s", _rates(packs, trained)),),
        skipped=tuple(skipped),
        wrong=tuple(_wrong(mine, theirs, ours)),
        aims=tuple(_aims(setting, size, recipe, packs, mine)),
    )


def _packs(recipe: Recipe, setting: Setting) -> list[PackedBatch]:
    """Those that ``run_bench`` makes of the same ``mix``."""
    config, stage = recipe.model.eagle(), recipe.stages[0]
    cost = tokens_per_tile(config)
    shapes, _ = mix(setting.toy).packs(stage.batch, stage.pack_length, cost)
    packs = [synthetic(shape, config.tile_size, cost) for shape in shapes]
    return [packs[number % len(packs)] for number in range(stage.batch)]


def _reference(recipe: Recipe, attention: str) -> ReferenceEagle:
    return ReferenceEagle(recipe.model.eagle(), SEED, dtype=torch.bfloat16, attention=attention)


def _ours(setting: Setting, recipe: Recipe, reference: ReferenceEagle) -> Measurement:
    """Our run from the reference's weights, with a trace of one more step."""
    state, sources = dict(reference.state_dict()), reference.sources()

    def prepare(engine: Engine) -> None:
        load_reference(engine, state, sources)

    trace = setting.folder / "traces" / f"{recipe.name}.json.gz"
    steps = TOY_STEPS if setting.toy else STEPS
    with alone(setting.platform):
        found = run_bench(
            recipe,
            recipe.stages[0],
            setting.platform,
            setting.hardware(),
            mix(setting.toy),
            steps,
            trace=trace,
            prepare=prepare,
        )
    assert found is not None  # this process is rank 0
    return found


def _theirs(
    setting: Setting, recipe: Recipe, reference: ReferenceEagle, packs: Sequence[PackedBatch]
) -> tuple[list[Trained], list[str]]:
    """transformers' runs from the same weights, and what could not be run."""
    weights = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    attention = packed_attention()
    ways = [("padded", "sdpa", padded_rows), ("packed", attention, packed_rows)]
    found, skipped = [], []
    if attention != "flash_attention_2":
        skipped.append(
            "transformers packed with FlashAttention: flash_attn is not installed; with PyTorch's and a mask"
        )
    device = setting.platform.device
    for name, attends_with, rows_of in ways:
        language: Any = reference.language
        language.set_attn_implementation(attends_with)
        reference.load_state_dict(weights)
        rows = [rows_of(pack).to(device) for pack in packs]
        steps = THEIR_TOY_STEPS if setting.toy else THEIR_STEPS
        title = f"transformers, {name}, {attends_with}"
        try:
            run: Run = train(reference.to(device), [rows] * (steps + 1), recipe.stages[0].learning_rate)
        except torch.OutOfMemoryError as error:
            skipped.append(f"{title}: out of memory, {str(error).splitlines()[0][:120]}")
        else:
            found.append(Trained(title, run.losses, statistics.median(run.seconds[1:]), run.peak_bytes))
        reference.zero_grad()
        if setting.cuda:
            torch.cuda.empty_cache()
    return found, skipped


def _rates(packs: Sequence[PackedBatch], trained: Sequence[Trained]) -> dict[str, float]:
    useful = sum(pack.useful_tokens for pack in packs)
    return {one.name: useful / one.seconds for one in trained}


def _mfu(setting: Setting, recipe: Recipe, packs: Sequence[PackedBatch], seconds: float) -> float | None:
    """By ``model/flops.py``, of the peak that the maker states; None where none is stated."""
    peak = stated_peak(setting.platform.device)
    flops = useful_flops(recipe.model.eagle(), recipe.stages[0].trainable, packs)
    return flops / seconds / peak if peak else None


def _side_by_side(setting: Setting, recipe: Recipe, packs: Sequence[PackedBatch], trained: Sequence[Trained]) -> Table:
    rates = _rates(packs, trained)
    rows = []
    for one in trained:
        mfu = _mfu(setting, recipe, packs, one.seconds)
        rows.append(
            (
                one.name,
                f"{one.losses[0]:.4f}",
                f"{one.losses[-1]:.4f} ({len(one.losses)})",
                f"{one.seconds:.3f}",
                f"{rates[one.name]:,.0f}",
                f"{mfu:.1%}" if mfu else "-",
                f"{one.peak_bytes / 1e9:.2f}" if one.peak_bytes else "-",
            )
        )
    stage = recipe.stages[0]
    title = f"{recipe.name}: {stage.batch} packs of {stage.pack_length} tokens a step, {mix(setting.toy).describe()}"
    header = ("", "first loss", "last loss (steps)", "step, s", "useful tokens/s", "MFU", "peak of tensors, GB")
    return Table(title, header, tuple(rows))


def _against_plan(ours: Measurement) -> Table:
    planned = {"step": ours.predicted_seconds, **ours.predicted_phases}
    measured = {"step": statistics.mean(ours.seconds), **ours.phases}
    rows = [
        (f"{name}, s", f"{seconds:.4f}", *_beside(seconds, planned.get(name), "{:.4f}"))
        for name, seconds in measured.items()
    ]
    memory, said = ours.peak_bytes / 1e9, ours.predicted_bytes / 1e9
    rows.append(("peak of tensors, GB", f"{memory:.3f}", *_beside(memory, said, "{:.3f}")))
    return Table(
        f"{ours.recipe}: against the plan of {ours.profile}", ("", "measured", "planned", "error"), tuple(rows)
    )


def _beside(measured: float, planned: float | None, form: str) -> tuple[str, str]:
    return ("-", "-") if planned is None else (form.format(planned), f"{planned / measured - 1:+.1%}")


def _wrong(mine: Trained, theirs: Sequence[Trained], ours: Measurement) -> list[str]:
    found = []
    for one in theirs:
        off = abs(mine.losses[0] / one.losses[0] - 1)
        if not off <= LOSS_TOLERANCE:  # also if it is no number
            found.append(f"first loss {mine.losses[0]:.4f}, {one.name} {one.losses[0]:.4f}: {off:.1e} apart")
    return found


def _aims(
    setting: Setting, size: Size, recipe: Recipe, packs: Sequence[PackedBatch], mine: Trained
) -> list[tuple[str, str, bool]]:
    if not setting.cuda or setting.toy or mine.peak_bytes is None:
        return []
    mfu = _mfu(setting, recipe, packs, mine.seconds)
    return (
        [("eagle2-1b, all parts: >= 40 % MFU", f"{mfu:.1%}", mfu >= 0.4)] if mfu and size.preset == "eagle2-1b" else []
    )
