"""The same steps of several recipes, one after another on the same device."""

import statistics
from collections.abc import Mapping

from megatron_eagle.config.recipe import Recipe
from megatron_eagle.gpu_day.alone import alone
from megatron_eagle.gpu_day.part import Setting, Table
from megatron_eagle.gpu_day.sizes import mix
from megatron_eagle.measuring.bench import Measurement, run_bench

TOY_STEPS = 1
LOSS_TOLERANCE = 1e-2  # of the first step in bf16, as in verification


def bench_each(setting: Setting, recipes: Mapping[str, Recipe], steps: int) -> dict[str, Measurement]:
    """``steps`` steps of the first stage of each, by name; each has the device to itself."""
    runs: dict[str, Measurement] = {}
    for name, recipe in recipes.items():
        with alone(setting.platform):
            found = run_bench(recipe, recipe.stages[0], setting.platform, setting.hardware(), mix(setting.toy), steps)
        assert found is not None  # this process is rank 0
        runs[name] = found
    return runs


def compared(
    what: str, runs: Mapping[str, Measurement], model: str, tolerance: float = LOSS_TOLERANCE
) -> tuple[Table, tuple[str, ...]]:
    """A row of each run, and which first losses are not that of the first run, relative to it. what: differs between
    them."""
    rows = tuple(
        (name, f"{one.losses[0]:.4f}", f"{statistics.median(one.seconds):.3f}", f"{one.peak_bytes / 1e9:.2f}")
        for name, one in runs.items()
    )
    first, *others = runs
    off = {name: abs(runs[name].losses[0] / runs[first].losses[0] - 1) for name in others}
    wrong = tuple(
        f"first loss with {name} is {far:.1e} away from {first}'s" for name, far in off.items() if far > tolerance
    )
    return Table(f"{model}: {what}", (what, "first loss", "step, s", "peak of tensors, GB"), rows), wrong
