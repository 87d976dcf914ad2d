"""Plans as text: the table of a stage, of its processes, of a search, and layouts to paste into a recipe."""

from collections.abc import Sequence
from dataclasses import fields

import yaml

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.planning.hardware import Hardware
from megatron_eagle.planning.plan import StagePlan, describe_layout, plan_stage
from megatron_eagle.planning.samples import Mix
from megatron_eagle.text import stacked
from megatron_eagle.training.log import format_duration

GB = 1e9
STAGE_HEADER = (
    "stage",
    "layout",
    "recompute",
    "GB a GPU",
    "fits",
    "step s",
    "balance",
    "bubble",
    "MFU",
    "useful tokens/s/GPU",
    "hours",
    "GPU-hours",
    "checkpoint",
)


def assumptions(hardware: Hardware, *, fp8: bool) -> str:
    """What the numbers rest on. fp8: whether the recipe multiplies so."""
    return (
        f"{hardware.name}: {hardware.peak_flops / 1e12:.0f} TFLOP/s stated peak; products at {hardware.products:.0%} "
        f"of it, attention {hardware.attention:.0%}, convolutions {hardware.convolutions:.0%}; "
        f"{hardware.memory_bytes / GB:.0f} GB less {hardware.reserved_bytes / GB:.1f} GB for what is no tensor. "
        f"Reading is not in the seconds of a step.{' fp8 is planned as bf16.' if fp8 else ''}"
    )


def refusal(plan: StagePlan, fitting: StagePlan | None) -> str:
    """What to say of a stage that does not fit. fitting: ``search.nearest`` of it."""
    what = (
        f"{plan.stage.name} needs {plan.peak / GB:.1f} GB on {plan.gpus} {plan.hardware.name}, "
        f"{plan.hardware.usable_bytes / GB:.1f} are there"
    )
    if fitting is None:
        return f"{what}; no layout near this one fits: --search looks at all, model.recompute=full needs less"
    return (
        f"{what}; the nearest layout that fits ({fitting.peak / GB:.1f} GB, {fitting.seconds:.2f} s a step): "
        f"'stages.{plan.stage.name}.layout={layout_as_yaml(fitting.layout)}'"
    )


def too_large(recipe: Recipe, stage: Stage, gpus: int, hardware: Hardware) -> str | None:
    """One line if ``stage`` does not fit by the plan of a usual mix, and what names a layout that does; else None."""
    plan = plan_stage(recipe, stage, gpus, hardware, Mix(packing=recipe.reading.packing))
    if plan.fits:
        return None
    return (
        f"{plan.stage.name} needs {plan.peak / GB:.1f} GB on {gpus} {hardware.name} by the plan, "
        f"{hardware.usable_bytes / GB:.1f} are there; 'megatron-eagle plan' names the nearest layout that fits"
    )


def one_line(plan: StagePlan) -> str:
    """A plan as it stands in the head of a recipe."""
    return (
        f"{plan.peak / GB:.1f} of {plan.hardware.usable_bytes / GB:.1f} GB on {plan.gpus} {plan.hardware.name}, "
        f"{plan.seconds:.1f} s a step, MFU {plan.mfu:.0%}, checkpoint {plan.checkpoint_bytes / GB:.2f} GB"
    )


def stage_table(plans: Sequence[StagePlan]) -> str:
    """One row a stage."""
    return narrow(STAGE_HEADER, [stage_row(plan) for plan in plans])


def stage_row(plan: StagePlan) -> list[str]:
    """A stage's numbers as texts, in the order of STAGE_HEADER."""
    hours = plan.hours()
    return [
        plan.stage.name,
        describe_layout(plan.layout),
        plan.again,
        f"{plan.peak / GB:.1f}",
        "yes" if plan.fits else f"NO ({plan.hardware.usable_bytes / GB:.0f})",
        f"{plan.seconds:.2f}",
        f"{plan.timeline.balance:.0%}",
        f"{plan.timeline.bubble:.0%}",
        f"{plan.mfu:.1%}",
        f"{plan.tokens_per_second_per_gpu:,.0f}",
        f"{hours:.1f}",
        f"{hours * plan.gpus:,.0f}",
        f"{plan.checkpoint_bytes / GB:.0f} GB, {format_duration(plan.checkpoint_seconds)}",
    ]


def memory_table(plan: StagePlan) -> str:
    """One row a pipeline stage: where the bytes of its fullest process are."""
    header = ["pp rank", "weights", "gradients", "optimizer", "inputs", "activations", "peak GB", "at"]
    rows = [
        [
            str(number),
            *(f"{value / GB:.2f}" for value in (m.weights, m.gradients, m.optimizer, m.inputs, m.activations, m.peak)),
            m.peak_at,
        ]
        for number, m in enumerate(plan.memory)
    ]
    return narrow(header, rows)


def time_line(plan: StagePlan) -> str:
    """Where the seconds of a step go, and how its work is made up."""
    encoder = plan.flops.encoder.total / plan.flops.total
    return (
        f"step {plan.seconds:.2f} s: pipeline {plan.pipeline:.2f}, spread encoders {plan.encoders:.2f}, gradient sums "
        f"{plan.reduction:.2f}, update {plan.update:.3f}; {plan.flops.total / 1e15:.2f} useful PFLOP, {encoder:.0%} of "
        f"them in the encoders; padding {1 - plan.useful_tokens / plan.tokens:.1%}"
    )


def stage_line(plan: StagePlan) -> str:
    """Why a pipeline waits: how much of the step each of its stages computes, and what the fullest costs the others."""
    busy = plan.timeline.busy
    shares = ", ".join(f"stage {number} {seconds / plan.pipeline:.0%}" for number, seconds in enumerate(busy))
    where = "on stage 0" if plan.layout.encoder == "tensor" else "spread over all processes, outside the pipeline"
    return (
        f"pipeline, encoders {where}: {shares} of the time busy; at most {plan.timeline.balance:.0%} of the stages can "
        f"be busy at once (balance), {1 - plan.timeline.bubble:.0%} are"
    )


def search_table(plans: Sequence[StagePlan]) -> str:
    """The best layouts, fastest first, and the first of them to paste."""
    if not plans:
        return "no layout fits"
    header = ["#", "layout", "layers per stage", "recompute", "GB a GPU", "step s", "balance", "bubble", "MFU", "hours"]
    rows = [
        [
            str(number),
            describe_layout(plan.layout),
            " ".join(map(str, plan.layout.layers_per_stage or ())) or "even",
            plan.again,
            f"{plan.peak / GB:.1f}",
            f"{plan.seconds:.2f}",
            f"{plan.timeline.balance:.0%}",
            f"{plan.timeline.bubble:.0%}",
            f"{plan.mfu:.1%}",
            f"{plan.hours():.1f}",
        ]
        for number, plan in enumerate(plans, start=1)
    ]
    best = plans[0]
    return f"{narrow(header, rows)}\n\n{recompute_as_override(best)}\nlayout: {layout_as_yaml(best.layout)}"


def recompute_as_override(plan: StagePlan) -> str:
    """What a plan computes again, as overrides of a recipe."""
    layers = "" if plan.recompute_layers is None else f" model.recompute_layers={plan.recompute_layers}"
    return f"model.recompute={plan.recompute}{layers}"


def layout_as_yaml(layout: Layout) -> str:
    """A layout on one line, as a recipe takes it, without what is the default."""
    default = Layout()
    chosen = {f.name: getattr(layout, f.name) for f in fields(layout)}
    chosen = {name: value for name, value in chosen.items() if value != getattr(default, name)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}
    return str(yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=1000)).strip()


def narrow(header: Sequence[str], rows: Sequence[Sequence[str]], keep: int = 1) -> str:
    """As Markdown tables that fit a terminal, one below the other, each with the first ``keep`` columns."""
    parts = stacked(header, rows, borders=3, keep=keep)
    return "\n\n".join(
        markdown([header[column] for column in part], [[row[column] for column in part] for row in rows])
        for part in parts
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns lined up, so that it also reads in a terminal."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
