"""Where a kernel may run, decided in one place: CUDA, or the CPU when Triton interprets its kernels.

Without this check a CPU tensor fails deep inside Triton ("0 active drivers"), and bfloat16 in the interpreter does not
fail at all: Triton 3.7 computes on the raw bits and returns nonsense. Callers choose between kernel and reference.
"""

import torch
import triton
from torch import Tensor


@triton.jit
def _probe() -> None:
    pass


# Triton decides when a kernel is decorated; asking a kernel is right even if the variable was set after the import.
INTERPRETED = not isinstance(_probe, triton.JITFunction)


def require_device(op: str, *tensors: Tensor) -> None:
    """RuntimeError unless ``tensors`` are all on one device on which the kernels of ``op`` compute correctly."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise RuntimeError(f"{op} needs all tensors on one device, got {', '.join(sorted(map(str, devices)))}")
    device = devices.pop()
    if device.type == "cuda":
        if device.index != torch.cuda.current_device():  # Triton launches there, whatever the tensors say
            raise RuntimeError(f"{op} got tensors on {device} while device {torch.cuda.current_device()} is current")
        return
    if device.type != "cpu" or not INTERPRETED:
        raise RuntimeError(
            f"{op} is a Triton kernel and got tensors on {device}: move them to CUDA, set TRITON_INTERPRET=1 before "
            f"Python starts to interpret the kernel on the CPU (slow, for tests), or call {op}_reference"
        )
    if any(tensor.dtype is torch.bfloat16 for tensor in tensors):
        _require_correct_bfloat16(op)


def _require_correct_bfloat16(op: str) -> None:
    from eagle_kernels.checking.interpreter import bfloat16_is_corrected  # tools are loaded only where they matter

    if not bfloat16_is_corrected():
        raise RuntimeError(
            f"{op} got bfloat16 in Triton's interpreter, which computes it wrongly without an error; "
            "call eagle_kernels.checking.interpreter.correct_bfloat16() once first"
        )
