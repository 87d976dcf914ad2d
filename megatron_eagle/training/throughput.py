"""How well a step used the machine: useful operations per second and process, and their share of the peak.

Operations are those of ``model/flops.py``: of the step's real segments and tiles, of what the stage trains, without
padding and without anything computed twice. The peak is the one of bf16 products that NVIDIA states; on a CPU there is
none to state, so there is no utilisation either.
"""

from collections.abc import Sequence

import torch

from megatron_eagle.config.layers import Frozen
from megatron_eagle.config.lora import LoraSettings
from megatron_eagle.config.model import EagleConfig
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.model.cost import Parts
from megatron_eagle.model.flops import Work, step_flops

# NVIDIA's data sheets, dense bf16; the first name that is part of the device's counts.
STATED_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}


def useful_flops(
    config: EagleConfig,
    trainable: Sequence[str],
    batches: Sequence[PackedBatch],
    lora: LoraSettings | None = None,
    frozen: tuple[Frozen, ...] = (),
) -> float:
    """Operations that ``batches`` need, forward and backward, on the whole model; for one that knows all tiles."""
    work = sum((Work.useful(batch) for batch in batches), Work(0, 0, 0))
    return step_flops(config, Parts.of(trainable, lora, frozen), work).total


def stated_peak(device: torch.device) -> float | None:
    """Operations a second that the maker of ``device`` states, None if it is not one of ``STATED_PEAKS``."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for kind, peak in STATED_PEAKS.items() if kind in name), None)


def utilisation(flops: float, seconds: float, processes: int, device: torch.device) -> dict[str, float | None]:
    """``tflops`` a second and process, and ``mfu``, of a step of all ``processes``; fields of a ``StepRecord``."""
    rate = flops / seconds / processes
    peak = stated_peak(device)
    return {"tflops": rate / 1e12, "mfu": rate / peak if peak else None}
