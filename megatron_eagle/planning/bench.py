"""Measures what the planner predicts: some steps of a recipe on synthetic packs, and a dated report beside the plan.

Every process of the job calls ``run_bench``; packs are those of ``samples.py`` with meaningless tokens and pixels, so
no data, tokenizer or checkpoint is needed. Reading is therefore not part of it.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch

from megatron_eagle.data.batch import PackedBatch
from megatron_eagle.data.packing import Segment, assemble_pack
from megatron_eagle.errors import UserError
from megatron_eagle.model.mixture import tokens_per_tile
from megatron_eagle.parallel.groups import destroy, initialise
from megatron_eagle.parallel.hand_round import hand_round
from megatron_eagle.planning.activations import Pack
from megatron_eagle.planning.hardware import Hardware
from megatron_eagle.planning.plan import describe_layout, plan_stage
from megatron_eagle.planning.report import markdown
from megatron_eagle.planning.samples import Mix
from megatron_eagle.platform import Platform
from megatron_eagle.recipe import Recipe, Stage
from megatron_eagle.training.engine import build_engine
from megatron_eagle.training.loss import normalise_weights
from megatron_eagle.training.throughput import useful_flops

WARM_UP = 1  # steps that are not counted


@dataclass(frozen=True)
class Measurement:
    """One run. seconds: of each counted step; phases: mean seconds of its parts; peak_bytes: of this process's tensors
    on a GPU, 0 on a CPU; predicted_*: what the plan says."""

    date: str
    recipe: str
    stage: str
    layout: str
    processes: int
    device: str
    torch: str
    packs: int
    pack_length: int
    seconds: list[float]
    phases: dict[str, float]
    useful_tokens_per_second: float
    tflops_per_process: float
    mfu: float
    peak_bytes: int
    predicted_seconds: float
    predicted_bytes: float
    profile: str


def synthetic(pack: Pack, side: int, cost: int) -> PackedBatch:
    """A pack of the given shape; all tiles stand in the segments that have room for them."""
    segments, left = [], pack.tiles
    sizes = pack.segments[:-1] if pack.padding else pack.segments
    for number, size in enumerate(sizes):
        own = min(left, size // cost)
        left -= own
        tokens = torch.arange(size) % 300 + 1
        tiles = torch.zeros(own, 3, side, side, dtype=torch.uint8)
        segments.append(Segment(str(number), tokens, tokens.clone(), torch.arange(own) * cost, tiles))
    return assemble_pack(segments, pack.length, 0)


def run_bench(
    recipe: Recipe, stage: Stage, platform: Platform, hardware: Hardware, mix: Mix, steps: int
) -> Measurement | None:
    """Train ``steps`` counted steps; the measurement on rank 0, None on the others."""
    config, layout = recipe.model.eagle(), recipe.stage_layout(stage)
    groups = initialise(layout, platform, timeout=timedelta(minutes=recipe.collective_timeout_minutes))
    try:
        if stage.batch % groups.dp_size:
            raise UserError(f"batch={stage.batch} packs cannot be shared out to {groups.dp_size} replicas")
        plan = plan_stage(recipe, stage, groups.world_size, hardware, mix)
        shapes, _ = mix.packs(stage.batch, stage.pack_length, tokens_per_tile(config))
        whole = [synthetic(s, config.tile_size, tokens_per_tile(config)) for s in shapes]
        whole = [whole[number % len(whole)] for number in range(stage.batch)]
        own = whole[groups.dp_rank :: groups.dp_size]
        engine = build_engine(recipe, stage, platform, groups)
        parts: dict[str, list[float]] = {"hand round": [], "forward and backward": [], "update": []}
        for _ in range(WARM_UP + steps):
            marks = [_now(platform)]
            batches = hand_round((lambda: own) if groups.is_reader else list, groups, platform.device)
            batches = normalise_weights(
                batches, stage.loss_normaliser, packs_in_step=stage.batch, data_parallel_group=groups.dp
            )
            marks.append(_now(platform))
            engine.forward_backward(batches)
            marks.append(_now(platform))
            engine.update()
            marks.append(_now(platform))
            for name, start, end in zip(parts, marks[:-1], marks[1:], strict=True):
                parts[name].append(end - start)
        counted = {name: times[WARM_UP:] for name, times in parts.items()}
        seconds = [sum(times) for times in zip(*counted.values(), strict=True)]
        mean = statistics.mean(seconds)
        rate = useful_flops(config, stage.trainable, whole) / mean / groups.world_size
        peak = torch.cuda.max_memory_allocated() if platform.device.type == "cuda" else 0
        if groups.rank:
            return None
        return Measurement(
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            recipe=recipe.name,
            stage=stage.name,
            layout=describe_layout(layout),
            processes=groups.world_size,
            device=torch.cuda.get_device_name() if platform.device.type == "cuda" else "cpu",
            torch=torch.__version__,
            packs=stage.batch,
            pack_length=stage.pack_length,
            seconds=seconds,
            phases={name: statistics.mean(times) for name, times in counted.items()},
            useful_tokens_per_second=sum(batch.useful_tokens for batch in whole) / mean,
            tflops_per_process=rate / 1e12,
            mfu=rate / hardware.peak_flops,
            peak_bytes=peak,
            predicted_seconds=plan.seconds,
            predicted_bytes=plan.memory[0].peak,
            profile=hardware.name,
        )
    finally:
        destroy()


def write_report(measured: Measurement, folder: Path, before: Path | None = None) -> Path:
    """``<date>-<recipe>-<stage>.md`` and ``.json`` in ``folder``, compared with the JSON of ``before`` if given."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{measured.date.replace(' ', '-').replace(':', '')}-{measured.recipe}-{measured.stage}"
    (folder / f"{name}.json").write_text(json.dumps(asdict(measured), indent=1) + "\n", encoding="utf-8")
    mean = statistics.mean(measured.seconds)
    spread = statistics.stdev(measured.seconds) if len(measured.seconds) > 1 else 0.0
    rows = [
        ["step, s", f"{mean:.3f} +- {spread:.3f}", f"{measured.predicted_seconds:.3f}"],
        *([f"  {phase}, s", f"{seconds:.3f}", ""] for phase, seconds in measured.phases.items()),
        ["useful tokens/s", f"{measured.useful_tokens_per_second:,.0f}", ""],
        ["TFLOP/s a process", f"{measured.tflops_per_process:.4g}", ""],
        [f"MFU of {measured.profile}'s peak", f"{measured.mfu:.1%}", ""],
        ["peak GB, first stage", f"{measured.peak_bytes / 1e9:.2f}" if measured.peak_bytes else "-",
         f"{measured.predicted_bytes / 1e9:.2f}"],
    ]  # fmt: skip
    header = ["", "measured", "planned"]
    if before is not None:
        try:
            earlier = Measurement(**json.loads(before.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{before} is no report of this command: {error}") from None
        header.append(f"on {earlier.date}")
        past = [statistics.mean(earlier.seconds), *earlier.phases.values(), earlier.useful_tokens_per_second]
        cells = [*(f"{value:,.3f}" for value in past), f"{earlier.tflops_per_process:.4g}", f"{earlier.mfu:.1%}", ""]
        rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    text = (
        f"# {measured.recipe} {measured.stage}, {measured.date}\n\n{measured.processes} processes on "
        f"{measured.device}, {measured.layout}; {measured.packs} synthetic packs of {measured.pack_length} "
        f"tokens a step, "
        f"{len(measured.seconds)} steps; torch {measured.torch}.\n\n{markdown(header, rows)}\n"
    )
    path = folder / f"{name}.md"
    path.write_text(text, encoding="utf-8")
    return path


def _now(platform: Platform) -> float:
    if platform.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
