"""The same steps of several recipes, one after another on the same device."""

from collections.abc import Mapping

from megatron_eagle.config.recipe import Recipe
from megatron_eagle.gpu_day.alone import alone
from megatron_eagle.gpu_day.part import Setting
from megatron_eagle.gpu_day.sizes import mix
from megatron_eagle.measuring.bench import Measurement, run_bench


def bench_each(setting: Setting, recipes: Mapping[str, Recipe], steps: int) -> dict[str, Measurement]:
    """``steps`` steps of the first stage of each, by name; each has the device to itself."""
    runs: dict[str, Measurement] = {}
    for name, recipe in recipes.items():
        with alone(setting.platform):
            found = run_bench(recipe, recipe.stages[0], setting.platform, setting.hardware(), mix(setting.toy), steps)
        assert found is not None  # this process is rank 0
        runs[name] = found
    return runs
