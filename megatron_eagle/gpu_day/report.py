"""The report of a day: Markdown with every part's tables, the same as JSON, and one picture of all charts."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_eagle.gpu_day.day import Outcome, outcome_file, read_outcome
from megatron_eagle.gpu_day.part import Chart, Table, part_names
from megatron_eagle.planning.report import markdown

CHARTS_IN_A_ROW = 2
COLOUR = "#1d5fa6"


def write_report(folder: Path, parts: Sequence[str] | None = None) -> Path:
    """``report.md``, ``.json`` and ``.png`` of the parts whose files are in ``folder``; the Markdown's path."""
    names = part_names() if parts is None else parts
    outcomes = {name: read_outcome(folder, name) for name in names}
    found = [one for one in outcomes.values() if one is not None]
    missing = [name for name, one in outcomes.items() if one is None]
    charts = [chart for one in found if one.result for chart in one.result.charts]
    if charts:
        _draw(charts, folder / "report.png")
    raw = [asdict(one) | {"result": one.result.as_dict() if one.result else None} for one in found]
    (folder / "report.json").write_text(
        json.dumps({"parts": raw, "missing": missing}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    path = folder / "report.md"
    path.write_text(as_text(folder.name, found, missing, picture=bool(charts)), encoding="utf-8")
    return path


def as_text(title: str, outcomes: Sequence[Outcome], missing: Sequence[str], *, picture: bool) -> str:
    """The Markdown: what the day came to, the machine, then part by part."""
    lines = [f"# GPU day {title}", ""]
    if outcomes:
        lines += [_machine(outcomes[-1].machine), ""]
    lines += [markdown(["part", "", "s", "wrong", "skipped"], [_verdict(one) for one in outcomes]), ""]
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    aims = [
        [aim, found, "yes" if met else "NO"] for one in outcomes if one.result for aim, found, met in one.result.aims
    ]
    if aims:
        lines += ["## Aims", "", markdown(["aim", "found", "met"], aims), ""]
    if picture:
        lines += ["![the charts of all parts](report.png)", ""]
    for one in outcomes:
        lines += [
            f"## {one.part}",
            "",
            f"{one.date}, {one.ending} in {one.seconds:.0f} s, commit {one.machine['commit']}",
            "",
        ]
        lines += _body(one)
    return "\n".join(lines).rstrip() + "\n"


def troubles(folder: Path, parts: Sequence[str] | None = None) -> list[str]:
    """A line for each part that did not come to its end, and for each thing that is wrong."""
    found = []
    for name in part_names() if parts is None else parts:
        one = read_outcome(folder, name)
        if one is not None and one.result is None:
            found.append(f"{name} {one.ending}, see {outcome_file(folder, name)}")
        elif one is not None and one.result is not None:
            found += [f"{name}: {wrong}" for wrong in one.result.wrong]
    return found


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB each" if machine["gpus"] else ""
    return (
        f"{machine['device']}: {machine['gpus']} GPU(s){memory}, driver {machine['driver']}, CUDA {machine['cuda']}; "
        f"{machine['processor']}; Python {machine['python']}, {versions}."
    )


def _verdict(one: Outcome) -> list[str]:
    wrong, skipped = ([], []) if one.result is None else (one.result.wrong, one.result.skipped)
    return [one.part, one.ending, f"{one.seconds:.0f}", str(len(wrong)), str(len(skipped))]


def _body(one: Outcome) -> list[str]:
    if one.result is None:
        return ["```", one.error.strip(), "```", ""]
    lines: list[str] = []
    for word, said in (("WRONG", one.result.wrong), ("skipped", one.result.skipped)):
        lines += [f"- {word}: {' '.join(text.split())}" for text in said]
    lines += [""] if lines else []
    for table in one.result.tables:
        lines += _table(table)
    return lines


def _table(table: Table) -> list[str]:
    return [table.title, "", markdown(list(table.header), [list(row) for row in table.rows]), ""]


def _draw(charts: Sequence[Chart], path: Path) -> None:
    """Horizontal bars with their numbers, one axes a chart."""
    rows = -(-len(charts) // CHARTS_IN_A_ROW)
    tallest = max(len(chart.bars) for chart in charts)
    figure = Figure(figsize=(6.5 * CHARTS_IN_A_ROW, rows * (1.2 + 0.35 * tallest)), layout="constrained")
    every = figure.subplots(rows, CHARTS_IN_A_ROW, squeeze=False).flat
    for axes, chart in zip(every, charts, strict=False):
        bars = axes.barh(list(chart.bars), list(chart.bars.values()), color=COLOUR)
        axes.bar_label(bars, fmt="{:,.3g}", padding=3, fontsize=8)
        axes.set_title(chart.title, fontsize=10)
        axes.set_xlabel(chart.unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.margins(x=0.15)
        axes.invert_yaxis()
    for axes in list(every)[len(charts) :]:
        axes.axis("off")
    figure.savefig(path, dpi=100)
