"""Several GPUs: layouts over NCCL against the plain process, spread encoders among them, and replicas from 1 to 8."""

import statistics

import torch
import torch.distributed as dist

from megatron_eagle.compat.platform import install
from megatron_eagle.config.layout import Layout
from megatron_eagle.gpu_day.part import Chart, PartResult, Setting, Table
from megatron_eagle.gpu_day.sizes import EAGLE_1B, mix, with_layout
from megatron_eagle.gpu_day.verified import verified
from megatron_eagle.measuring.bench import Measurement, run_bench
from megatron_eagle.parallel.process_pool import World
from megatron_eagle.verification.rows import quick_table

MOST_IN_A_ROW = 4  # processes; the quick table's
SCALES = (1, 2, 4, 8)
STEPS, TOY_STEPS = 5, 1
TIMEOUT = 240.0  # seconds of one scale


def run(setting: Setting) -> PartResult:
    """On a CPU, at toy size, two processes over gloo."""
    count = torch.cuda.device_count() if setting.cuda else 2
    if count < 2:
        return PartResult(skipped=("NCCL's layouts, spread encoders and scaling: this machine has one GPU",))
    rows = [row for row in quick_table(min(count, MOST_IN_A_ROW)) if row.processes > 1]
    layouts = verified(rows, ("torch",), setting.toy)
    scales = [size for size in SCALES if size <= count]
    found = {size: _scaled(setting, size) for size in scales}
    rates = {size: one.useful_tokens_per_second for size, one in found.items()}
    table = tuple(
        (
            str(size),
            f"{statistics.median(one.seconds):.3f}",
            f"{rates[size]:,.0f}",
            f"{rates[size] / rates[1] / size:.0%}",
        )
        for size, one in found.items()
    )
    over = "NCCL" if setting.cuda else "gloo"
    title = f"{EAGLE_1B.recipe(setting.toy).name}, one replica a process over {over}, as many packs for each"
    skipped = tuple(f"{size} processes: there are {count}" for size in SCALES if size > count)
    return PartResult(
        tables=(*layouts.tables, Table(title, ("processes", "step, s", "useful tokens/s", "of linear"), table)),
        values={"layouts": layouts.values, "scaling": {str(size): vars(one) for size, one in found.items()}},
        charts=(Chart("scaling", "useful tokens/s", {str(size): rate for size, rate in rates.items()}),),
        skipped=skipped,
        wrong=layouts.wrong,
    )


def _scaled(setting: Setting, size: int) -> Measurement:
    world = World(size)
    try:
        found: Measurement = world.run(_bench, setting, timeout=TIMEOUT)[0]
    finally:
        world.stop()
    return found


def _bench(setting: Setting) -> Measurement | None:
    """Runs in every process of a world."""
    platform, size = install(local_rank=dist.get_rank()), EAGLE_1B
    recipe = size.recipe(setting.toy)
    recipe = with_layout(recipe, Layout(), recipe.stages[0].batch * dist.get_world_size())
    steps = TOY_STEPS if setting.toy else STEPS
    return run_bench(recipe, recipe.stages[0], platform, setting.hardware(), mix(setting.toy), steps)
