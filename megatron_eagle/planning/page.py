"""A plan as a page: memory by part and rank, where the seconds of a step go, the schedule, a bar for each layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.pages import render, write
from megatron_eagle.pages.charts import Part, Row
from megatron_eagle.planning.hardware import Hardware
from megatron_eagle.planning.memory import Memory
from megatron_eagle.planning.plan import StagePlan, describe_layout
from megatron_eagle.planning.report import (
    GB,
    STAGE_HEADER,
    assumptions,
    layout_as_yaml,
    recompute_as_override,
    stage_line,
    stage_row,
    time_line,
)

MEMORY_PARTS = ("weights", "gradients", "optimizer", "inputs", "activations")
STEP_PARTS = ("pipeline", "encoders", "reduction", "update")


@dataclass(frozen=True)
class Span:
    """A pass in a lane: left and width in thousandths of the step's pipeline."""

    left: float
    width: float
    kind: str
    title: str


@dataclass(frozen=True)
class Lane:
    """A pipeline stage and its passes; what lies between them is waiting."""

    name: str
    spans: tuple[Span, ...]
    busy: str


@dataclass(frozen=True)
class StageView:
    """A stage of a recipe as the page shows it. limit: where the memory ends, in percent of the axis."""

    plan: StagePlan
    layout: str
    verdict: str
    lines: tuple[str, ...]
    memory: tuple[Row, ...]
    limit: float
    step: tuple[Row, ...]
    lanes: tuple[Lane, ...]
    layouts: tuple[Row, ...]
    paste: str


def write_page(
    name: str,
    hardware: Hardware,
    found: Sequence[tuple[StagePlan, Sequence[StagePlan]]],
    out: Path,
    *,
    fp8: bool,
    without: Sequence[str] = (),
) -> None:
    """``out`` with each stage's plan and, of a search, its layouts, best first; UserError if the disk refuses it.

    without: a line for each stage that a search found no layout for.
    """
    page = render(
        "megatron_eagle.planning:plan.html.j2",
        name=name,
        without=without,
        hardware=hardware,
        assumptions=assumptions(hardware, fp8=fp8),
        header=STAGE_HEADER,
        rows=[stage_row(plan) for plan, _ in found],
        stages=[view_stage(plan, layouts) for plan, layouts in found],
        memory_parts=MEMORY_PARTS,
        step_parts=STEP_PARTS,
    )
    write(page, out)


def view_stage(plan: StagePlan, layouts: Sequence[StagePlan]) -> StageView:
    """A plan in numbers that the template draws; layouts: of a search, this one among them."""
    usable = plan.hardware.usable_bytes
    axis = max(usable, plan.peak) * 1.02
    slowest = max((one.seconds for one in layouts), default=plan.seconds)
    lines = [time_line(plan)] + ([stage_line(plan)] if plan.layout.pp > 1 else [])
    return StageView(
        plan=plan,
        layout=f"{describe_layout(plan.layout)}, recompute {plan.again}",
        verdict=f"{plan.peak / GB:.1f} of {usable / GB:.1f} GB: {'fits' if plan.fits else 'does not fit'}",
        lines=tuple(lines),
        memory=tuple(_memory_row(number, one, axis, usable) for number, one in enumerate(plan.memory)),
        limit=100 * usable / axis,
        step=(_step_row("a step", plan, plan.seconds),),
        lanes=tuple(_lanes(plan)),
        layouts=tuple(
            _step_row(f"{number}. {describe_layout(one.layout)}, {one.again}", one, slowest)
            for number, one in enumerate(layouts, 1)
        ),
        paste=f"{recompute_as_override(plan)} layout: {layout_as_yaml(plan.layout)}",
    )


def _memory_row(number: int, memory: Memory, axis: float, usable: float) -> Row:
    held = {name: getattr(memory, name) for name in MEMORY_PARTS[:-1]}
    held["activations"] = max(memory.activations, memory.update)
    parts = tuple(Part(100 * size / axis, f"{name}: {size / GB:.2f} GB") for name, size in held.items())
    return Row(f"pipeline rank {number}", parts, f"{memory.peak / GB:.1f} GB", memory.peak <= usable)


def _step_row(name: str, plan: StagePlan, axis: float) -> Row:
    parts = tuple(Part(100 * getattr(plan, part) / axis, f"{part}: {getattr(plan, part):.3f} s") for part in STEP_PARTS)
    return Row(name, parts, f"{plan.seconds:.2f} s, {plan.peak / GB:.0f} GB", plan.fits)


def _lanes(plan: StagePlan) -> list[Lane]:
    whole = plan.timeline.seconds or 1.0
    lanes = []
    for rank, (starts, ends) in enumerate(zip(plan.timeline.starts, plan.timeline.ends, strict=True)):
        spans = []
        for event, start in starts.items():
            chunk = f", chunk {event.chunk}" if plan.layout.vpp else ""
            title = f"{event.kind} of pack {event.microbatch}{chunk}: {start:.3f} to {ends[event]:.3f} s"
            spans.append(Span(1000 * start / whole, 1000 * (ends[event] - start) / whole, event.kind, title))
        lanes.append(Lane(f"pipeline rank {rank}", tuple(spans), f"{plan.timeline.busy[rank] / whole:.0%} busy"))
    return lanes
