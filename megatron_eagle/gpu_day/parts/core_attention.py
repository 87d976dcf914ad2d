"""``model.attention``: the same steps with each attention over packs that can run here, to choose by time."""

from typing import get_args

from megatron_eagle.errors import UserError
from megatron_eagle.gpu_day.part import PartResult, Setting
from megatron_eagle.gpu_day.sizes import EAGLE_1B
from megatron_eagle.gpu_day.variants import TOY_STEPS, bench_each, compared
from megatron_eagle.model.attention import core_over_packs
from megatron_eagle.model.build_context import AttentionCore

STEPS = 10


def run(setting: Setting) -> PartResult:
    """Ours, FlashAttention and Transformer Engine's; those that this machine cannot run are skipped with the reason."""
    ways, skipped = {}, []
    for name in get_args(AttentionCore):
        recipe = EAGLE_1B.recipe(setting.toy, attention=name)
        try:
            recipe.model.attention_on(setting.platform.device.type)
            core_over_packs(name, "torch")
        except UserError as error:
            skipped.append(str(error))
        else:
            ways[name] = recipe
    runs = bench_each(setting, ways, TOY_STEPS if setting.toy else STEPS)
    table, wrong = compared("model.attention", runs, ways["packed"].name)
    return PartResult((table,), {name: vars(one) for name, one in runs.items()}, skipped=tuple(skipped), wrong=wrong)
