"""Writes a measurement of ``bench.py`` down: dated Markdown, JSON, PNG and HTML, beside the plan and an earlier one."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from megatron_eagle.errors import UserError
from megatron_eagle.measuring.bench import Measurement
from megatron_eagle.pages import render, write
from megatron_eagle.pages.charts import Part, Row
from megatron_eagle.planning.report import markdown
from megatron_eagle.training.step import DISTRIBUTING, PHASES

_EARLIER_NAMES = {"hand round": DISTRIBUTING}  # of phases, in reports of 2026-11-20
_COLOURS = dict(zip(PHASES, ("#98a2ad", "#1d5fa6", "#a9c7e8"), strict=True))


def report_name(measured: Measurement) -> str:
    """``<date>-<recipe>-<stage>-<layout>``, for the files of a report."""
    when = measured.date.replace(" ", "-").replace(":", "")
    layout = measured.layout.replace("=", "").replace(" ", "-")
    return f"{when}-{measured.recipe}-{measured.stage}-{layout}"


def read_measurement(path: Path) -> Measurement:
    """The JSON of an earlier report; UserError if it is none."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        entry["phases"] = {_EARLIER_NAMES.get(name, name): seconds for name, seconds in entry["phases"].items()}
        return Measurement(**entry)
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no report of this command: {error}") from None


def write_report(measured: Measurement, folder: Path, before: Path | None = None) -> Path:
    """Files of ``report_name`` in ``folder``, set beside the JSON of ``before`` if given; returns the Markdown's."""
    earlier = read_measurement(before) if before else None
    folder.mkdir(parents=True, exist_ok=True)
    name = report_name(measured)
    (folder / f"{name}.json").write_text(json.dumps(asdict(measured), indent=1) + "\n", encoding="utf-8")
    draw(measured, folder / f"{name}.png", earlier)
    text = f"# {measured.recipe} {measured.stage}, {measured.date}\n\n{_setting(measured)}\n\n"
    text += f"{table(measured, earlier)}\n\n![time by phase and memory]({name}.png)\n"
    path = folder / f"{name}.md"
    path.write_text(text, encoding="utf-8")
    write(_page(measured, earlier), folder / f"{name}.html")
    return path


def table(measured: Measurement, earlier: Measurement | None = None) -> str:
    """Measured, planned, and with ``earlier`` that and by how much it changed."""
    return markdown(*_table(measured, earlier))


def _table(measured: Measurement, earlier: Measurement | None) -> tuple[list[str], list[list[str]]]:
    header: list[str] = ["", "measured", "planned"]
    rows: list[list[str]] = []
    now = _numbers(measured)
    past = _numbers(earlier) if earlier else {}
    if earlier:
        header += [f"on {earlier.date}", "change"]
    spread = statistics.stdev(measured.seconds) if len(measured.seconds) > 1 else 0.0
    for name, (value, planned, form) in now.items():
        shown = form.format(value) + (f" +- {spread:.3f}" if name == "step, s" else "")
        row = [name, shown, "" if planned is None else form.format(planned)]
        if earlier:
            old = past.get(name, (None, None, ""))[0]
            row += ["", ""] if old is None else [form.format(old), f"{value / old - 1:+.1%}" if old else ""]
        rows.append(row)
    return header, rows


def _numbers(m: Measurement) -> dict[str, tuple[float, float | None, str]]:
    """name -> (measured, planned, format)."""
    numbers: dict[str, tuple[float, float | None, str]] = {
        "step, s": (statistics.mean(m.seconds), m.predicted_seconds, "{:.3f}")
    }
    for phase, seconds in m.phases.items():
        numbers[f"  {phase}, s"] = (seconds, m.predicted_phases.get(phase), "{:.3f}")
    numbers["useful tokens/s"] = (m.useful_tokens_per_second, None, "{:,.0f}")
    numbers["padding"] = (m.padding, None, "{:.1%}")
    numbers["TFLOP/s a process"] = (m.tflops_per_process, None, "{:.4g}")
    planned_mfu = m.mfu * statistics.mean(m.seconds) / m.predicted_seconds
    numbers[f"MFU of {m.profile}'s peak"] = (m.mfu, planned_mfu, "{:.1%}")
    numbers["peak of tensors, first process, GB"] = (m.peak_bytes / 1e9, m.predicted_bytes / 1e9, "{:.3f}")
    return numbers


def _setting(m: Measurement) -> str:
    reduced = f" Reduced: {', '.join(m.reduced)}." if m.reduced else ""
    return (
        f"{m.processes} processes on {m.device}, {m.layout}; {m.packs} packs of {m.pack_length} tokens a step "
        f"({m.packs_are}); {len(m.seconds)} steps; torch {m.torch}; planned with the profile {m.profile}.{reduced}"
    )


def _page(measured: Measurement, earlier: Measurement | None) -> str:
    times = {"measured": measured.phases, "planned": measured.predicted_phases}
    sizes = {"measured": measured.peak_bytes, "planned": measured.predicted_bytes}
    if earlier:
        times[f"on {earlier.date}"], sizes[f"on {earlier.date}"] = earlier.phases, earlier.peak_bytes
    longest = max(sum(phases.values()) for phases in times.values())
    slowest, largest = max(measured.seconds), max(sizes.values())
    header, rows = _table(measured, earlier)
    return render(
        "megatron_eagle.measuring:bench.html.j2",
        measured=measured,
        mean=statistics.mean(measured.seconds),
        setting=_setting(measured),
        phases=PHASES,
        seconds=[_phases_row(name, phases, longest) for name, phases in times.items()],
        steps=[
            Row(f"step {number}", (Part(100 * seconds / slowest, f"{seconds:.3f} s"),), f"{seconds:.3f} s")
            for number, seconds in enumerate(measured.seconds, 1)
        ],
        memory=[
            Row(name, (Part(100 * size / largest, f"{size / 1e9:.3f} GB"),), f"{size / 1e9:.3f} GB")
            for name, size in sizes.items()
        ],
        header=header,
        rows=rows,
    )


def _phases_row(name: str, phases: Mapping[str, float], axis: float) -> Row:
    each = [(phase, phases.get(phase, 0.0)) for phase in PHASES]
    parts = tuple(Part(100 * seconds / axis, f"{phase}: {seconds:.3f} s") for phase, seconds in each)
    return Row(name, parts, f"{sum(phases.values()):.3f} s")


def draw(measured: Measurement, path: Path, earlier: Measurement | None = None) -> None:
    """Two panels: seconds of a step by phase, and bytes; measured, planned and earlier side by side."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    seconds, memory = figure.subplots(1, 2)
    bars = [("measured", measured.phases), ("planned", measured.predicted_phases)]
    bars += [(earlier.date, earlier.phases)] if earlier else []
    for place, (_, phases) in enumerate(bars):
        below = 0.0
        for phase in PHASES:
            value = phases.get(phase, 0.0)
            seconds.bar(place, value, bottom=below, color=_COLOURS[phase], label=phase if place == 0 else None)
            below += value
    seconds.set_xticks(range(len(bars)), [label for label, _ in bars])
    seconds.set_title(f"seconds of a step, MFU {measured.mfu:.1%}", loc="left", fontsize=10)
    seconds.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(PHASES))
    sizes = [("measured", measured.peak_bytes), ("planned", measured.predicted_bytes)]
    sizes += [(earlier.date, earlier.peak_bytes)] if earlier else []
    memory.bar([label for label, _ in sizes], [size / 1e9 for _, size in sizes], color=_COLOURS["forward and backward"])
    memory.set_title("GB of tensors at the peak, first process", loc="left", fontsize=10)
    for axes in (seconds, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
