"""What one process can have of ``verify``: fp32 without TF32 and bf16, our kernels off and on."""

from megatron_eagle.gpu_day.alone import NO_CUDA
from megatron_eagle.gpu_day.part import PartResult, Setting
from megatron_eagle.gpu_day.verified import verified
from megatron_eagle.verification.rows import quick_table


def run(setting: Setting) -> PartResult:
    """The quick table's rows of one process, with PyTorch's operations and with our kernels."""
    rows = quick_table(1)
    if setting.cuda:
        return verified(rows, ("torch", "triton"), setting.toy)
    return verified(rows, ("torch",), setting.toy, (f"rows with our kernels: {NO_CUDA}",))
