"""The kernels' speed beside eager PyTorch, torch.compile, FlexAttention, PyTorch's varlen and Liger-Kernel."""

from eagle_kernels.checking.timing import NEEDS_CUDA, TIMED, Measurement, copy_bandwidth, timing_of

from megatron_eagle.gpu_day.part import Chart, PartResult, Setting, Table

HEADER = ("case", "contender", "ms", "TB/s", "share of copy", "TFLOP/s", "peak MiB")


def run(setting: Setting) -> PartResult:
    """Every kernel that has a ``timing.py``; on a CPU the plain versions run once and nothing is timed."""
    device = setting.platform.device
    bandwidth = copy_bandwidth(device)
    tables, charts, aims, skipped, values = [], [], [], [], {}
    for kernel in TIMED:
        timing = timing_of(kernel)
        found: list[Measurement] = list(timing.measured(device, setting.toy))
        rows = tuple(_cells(one, bandwidth) for one in found if one.milliseconds is not None)
        tables += [Table(f"{kernel}: median with a cold cache", HEADER, rows)] if rows else []
        skipped += sorted({f"{kernel}, {one.contender}: {one.failure}" for one in found if one.failure})
        aims += [(aim.aim, aim.found, aim.met) for aim in timing.aims(found, bandwidth)]
        charts += _charts(kernel, found)
        values[kernel] = [vars(one) | {"roofline": vars(one.roofline)} for one in found]
    if bandwidth is None:
        skipped.append(f"copy bandwidth: {NEEDS_CUDA}")
    return PartResult(
        tuple(tables), values | {"copy_bandwidth": bandwidth}, tuple(charts), tuple(skipped), aims=tuple(aims)
    )


def _cells(one: Measurement, bandwidth: float | None) -> tuple[str, ...]:
    speed, arithmetic = one.bytes_per_second, one.operations_per_second
    return (
        one.case,
        one.contender,
        f"{one.milliseconds:.3f}",
        f"{speed / 1e12:.2f}" if speed else "-",
        f"{speed / bandwidth:.0%}" if speed and bandwidth else "-",
        f"{arithmetic / 1e12:.0f}" if arithmetic else "-",
        "-" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:.0f}",
    )


def _charts(kernel: str, found: list[Measurement]) -> list[Chart]:
    """The last case of a kernel, the largest."""
    timed = [one for one in found if one.milliseconds is not None and one.case == found[-1].case]
    return (
        [Chart(f"{kernel}: {found[-1].case}", "ms", {one.contender: one.milliseconds for one in timed})]
        if timed
        else []
    )
