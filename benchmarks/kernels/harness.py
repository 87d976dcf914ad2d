"""What the kernel benchmarks share: timing, peak memory, the device's own copy bandwidth, and the dated report.

A report says hardware, commit and command, holds one table and one plot, and lands in ``benchmarks/kernels/reports``.
Not run yet: this project's machines had no GPU when it was written.
"""

import argparse
import datetime
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from eagle_kernels.checking.registry import Roofline

HERE = Path(__file__).resolve().parent
MEBIBYTE = 2**20
COPY_BYTES = 2**30  # large enough that no cache helps
NOT_AVAILABLE = "-"


@dataclass(frozen=True)
class Measurement:
    """One contender on one case; ``failure`` says why there is no time."""

    case: str
    contender: str
    roofline: Roofline
    milliseconds: float | None
    peak_bytes: int | None
    failure: str = ""


def require_gpu() -> torch.device:
    """The CUDA device; ends the program with the reason where there is none."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark measures a GPU, and torch finds no CUDA device here")
    return torch.device("cuda")


def arguments(description: str) -> Path:
    """Parses the command line every benchmark has and returns the folder for the report."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--reports", type=Path, default=HERE / "reports", help="folder for the dated report")
    return parser.parse_args().reports


def measure(case: str, contender: str, roofline: Roofline, function: Callable[[], object]) -> Measurement:
    """The median of many runs with a cold L2 cache, and the most memory the function held beyond what was there before.

    A contender that cannot run (out of memory, a shape it refuses) is reported, not fatal.
    """
    try:
        function()  # compiles and tunes outside the measurement
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return Measurement(case, contender, roofline, triton.testing.do_bench(function, return_mode="median"), peak)
    except Exception as error:
        torch.cuda.empty_cache()
        return Measurement(
            case, contender, roofline, None, None, f"{type(error).__name__}: {error}".splitlines()[0][:120]
        )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read plus written, of the device's own copy: what a kernel that only moves memory can reach."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * COPY_BYTES / (milliseconds * 1e-3)


def write_report(kernel: str, measurements: Sequence[Measurement], bandwidth: float, folder: Path) -> Path:
    """Writes ``<date>-<kernel>.md`` with its plot beside it and returns its path; also prints it."""
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = folder / f"{date}-{kernel}.md"
    text = "\n".join(_lines(kernel, date, measurements, bandwidth, path.with_suffix(".svg").name)) + "\n"
    path.write_text(text)
    _plot(kernel, measurements, path.with_suffix(".svg"))
    print(text)
    return path


def _lines(kernel: str, date: str, measurements: Sequence[Measurement], bandwidth: float, plot: str) -> list[str]:
    device = torch.cuda.get_device_properties(0)
    lines = [
        f"# {kernel}, {date}",
        "",
        f"- hardware: {device.name}, {device.multi_processor_count} multiprocessors, "
        f"{device.total_memory / 2**30:.0f} GiB",
        f"- software: torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}",
        f"- commit: {_commit()}",
        f"- command: `python {' '.join(sys.argv)}`",
        f"- copy bandwidth of the device, measured: {bandwidth / 1e12:.2f} TB/s (read plus written)",
        "",
        "Median of many runs, L2 cache cold. Share of copy: least traffic over time, relative to that bandwidth.",
        "",
        "| case | contender | ms | TB/s | share of copy | TFLOP/s | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    return [*lines, *(_table_row(found, bandwidth) for found in measurements), "", f"![times]({plot})"]


def _table_row(found: Measurement, bandwidth: float) -> str:
    if found.milliseconds is None or found.peak_bytes is None:
        return f"| {found.case} | {found.contender} | {found.failure} |" + f" {NOT_AVAILABLE} |" * 4
    seconds = found.milliseconds * 1e-3
    speed = found.roofline.bytes_moved / seconds
    arithmetic = f"{found.roofline.operations / seconds / 1e12:.0f}" if found.roofline.operations else NOT_AVAILABLE
    return (
        f"| {found.case} | {found.contender} | {found.milliseconds:.3f} | {speed / 1e12:.2f} | {speed / bandwidth:.0%} "
        f"| {arithmetic} | {found.peak_bytes / MEBIBYTE:.0f} |"
    )


def _commit() -> str:
    """The commit, marked if the working tree differs from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not under version control"


def _plot(kernel: str, measurements: Sequence[Measurement], path: Path) -> None:
    """Bars of time per contender, one group a case."""
    import matplotlib  # only whoever writes a report needs it

    matplotlib.use("svg")
    from matplotlib import pyplot

    timed = [found for found in measurements if found.milliseconds is not None]
    contenders = list(dict.fromkeys(found.contender for found in timed))
    cases = list(dict.fromkeys(found.case for found in timed))
    figure, axes = pyplot.subplots(figsize=(1.5 + 2.0 * len(cases), 4.0), layout="constrained")
    width = 0.8 / max(1, len(contenders))
    for number, contender in enumerate(contenders):
        times = {found.case: found.milliseconds for found in timed if found.contender == contender}
        places = [index + number * width for index, case in enumerate(cases) if case in times]
        axes.bar(places, [times[case] for case in cases if case in times], width, label=contender)
    axes.set_xticks([index + 0.4 - width / 2 for index in range(len(cases))], cases)
    axes.set_ylabel("milliseconds, lower is better")
    axes.set_title(kernel)
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)
