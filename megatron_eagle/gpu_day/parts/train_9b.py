"""Steps of Eagle2-9B at its true width, cut to two decoder layers: against the plan, and beside transformers."""

from megatron_eagle.gpu_day.part import PartResult, Setting
from megatron_eagle.gpu_day.sizes import EAGLE_9B
from megatron_eagle.gpu_day.training_run import train_model


def run(setting: Setting) -> PartResult:
    """``train_model`` of this size."""
    return train_model(setting, EAGLE_9B)
