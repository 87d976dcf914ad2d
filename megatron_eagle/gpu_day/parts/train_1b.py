"""Steps of Eagle2-1B: against the plan, and beside transformers."""

from megatron_eagle.gpu_day.part import PartResult, Setting
from megatron_eagle.gpu_day.sizes import EAGLE_1B
from megatron_eagle.gpu_day.training_run import train_model


def run(setting: Setting) -> PartResult:
    """``train_model`` of this size."""
    return train_model(setting, EAGLE_1B)
