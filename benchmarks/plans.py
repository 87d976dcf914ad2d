"""Writes docs/plans.md: what the published models need on 8 to 256 H100, their published hours, and fine-tuning.

    python benchmarks/plans.py docs/plans.md

Of a few layouts, each with and without recomputation, the fastest that fits is shown. The plans of the recipes for
fine-tuning are also written into their heads.
"""

import re
import sys
from pathlib import Path

from megatron_eagle.compat.platform import install
from megatron_eagle.config.layout import Layout
from megatron_eagle.errors import UserError

GPUS = (8, 64, 128, 256)
MODELS = ("eagle2-1b", "eagle2-2b", "eagle2-9b", "eagle2-34b", "eagle2.5-8b")
SHAPES = ((1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (4, 2, 1), (4, 1, 2), (4, 1, 4), (8, 4, 1), (8, 2, 2))


def layouts():
    """The layouts that are tried."""
    for tp, pp, cp in SHAPES:
        shape = {"tp": tp, "pp": pp, "cp": cp, "sequence_parallel": tp > 1}
        if pp == 1:
            yield Layout(**shape)
        yield Layout(**shape, encoder="spread", encoder_chunk=8)


def best(recipe, stage, gpus, hardware, mix):
    """(the fastest plan that fits, or None; the smallest peak that was seen)."""
    from megatron_eagle.planning.plan import plan_stage
    from megatron_eagle.planning.search import with_layout

    fastest, smallest = None, None
    for layout in layouts():
        for recompute in ("selective", "full"):
            try:
                variant = with_layout(recipe, stage, layout, recompute)
                plan = plan_stage(variant, variant.stage(stage.name), gpus, hardware, mix)
            except (UserError, ValueError):
                continue
            smallest = min(smallest or plan.peak, plan.peak)
            if plan.fits and (fastest is None or plan.seconds < fastest.seconds):
                fastest = plan
    return fastest, smallest


CARDS = {"eagle2-1b-lora-24gb": "rtx4090"}  # of the recipes for fine-tuning; the others are for H100


def finetune():
    """The plan of each recipe of examples/finetune, (its file, its plan)."""
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.planning.hardware import load_hardware
    from megatron_eagle.planning.plan import plan_stage
    from megatron_eagle.planning.samples import Mix

    for file in sorted(Path("examples/finetune").glob("*/recipe.yaml")):
        recipe = load_recipe(file)
        (stage,) = recipe.stages
        yield file, plan_stage(recipe, stage, stage.gpus, load_hardware(CARDS.get(recipe.name, "h100")), Mix())


def finetune_section():
    """The table of these plans."""
    from megatron_eagle.planning.plan import describe_layout
    from megatron_eagle.planning.report import markdown

    header = ["recipe", "trains", "pack", "cards", "layout", "recompute", "GB", "s a step", "MFU", "checkpoint GB"]
    rows = []
    for file, plan in finetune():
        lora = "\nlora:" in file.read_text(encoding="utf-8")
        rows.append(
            [
                file.parent.name,
                f"{'adapters of ' if lora else ''}{', '.join(plan.stage.trainable)}",
                f"{plan.stage.pack_length:,}",
                f"{plan.gpus} {plan.hardware.name}",
                describe_layout(plan.layout),
                plan.recompute,
                f"{plan.peak / 1e9:.1f}",
                f"{plan.seconds:.1f}",
                f"{plan.mfu:.0%}",
                f"{plan.checkpoint_bytes / 1e9:.2f}",
            ]
        )
    return f"## Fine-tuning\n\nThe recipes of `examples/finetune/`, as they are.\n\n{markdown(header, rows)}\n"


def write_heads():
    """Put each plan into its recipe's head."""
    from megatron_eagle.planning.report import one_line

    for file, plan in finetune():
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub("# Plan: .*", f"# Plan: {one_line(plan)}", text), encoding="utf-8")


def page():
    """The page, part by part."""
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.planning.hardware import load_hardware
    from megatron_eagle.planning.plan import describe_layout
    from megatron_eagle.planning.published import BRACKET, PUBLISHED, Software, as_published, matching_tokens, software
    from megatron_eagle.planning.report import assumptions, markdown
    from megatron_eagle.planning.samples import Mix
    from megatron_eagle.planning.timing import link_rate

    hardware, mix = load_hardware("h100"), Mix()
    yield "# Plans of the published models on H100\n"
    yield (
        "Computed, not measured: `python benchmarks/plans.py docs/plans.md` writes this page; see docs/planning.md.\n\n"
        f"{assumptions(hardware, fp8=False)} Packs: {mix.describe()}.\n"
        "Hours are for the steps of `examples/*/recipe.yaml`. Layouts are the\n"
        "fastest that fit of a few, with the recipe's batch; a dash means that the batch cannot be shared "
        "out or nothing fits, with the\n"
        "smallest peak seen.\n"
    )
    for model in MODELS:
        recipe = load_recipe(Path(f"examples/{model}/recipe.yaml"))
        rows = []
        for stage in recipe.stages:
            for gpus in GPUS:
                plan, smallest = best(recipe, stage, gpus, hardware, mix)
                head = [stage.name, f"{stage.pack_length:,}", str(gpus)]
                if plan is None:
                    rows.append([*head, "-", "", f"{smallest / 1e9:.0f}" if smallest else "-", "", "", "", ""])
                    continue
                rows.append(
                    [
                        *head,
                        describe_layout(plan.layout),
                        plan.recompute,
                        f"{plan.peak / 1e9:.0f}",
                        f"{plan.mfu:.0%}",
                        f"{plan.tokens_per_second_per_gpu:,.0f}",
                        f"{plan.hours():.1f}",
                        f"{plan.hours() * gpus:,.0f}",
                    ]
                )
            print(model, stage.name, flush=True)
        header = ["stage", "pack", "GPUs", "layout", "recompute", "GB", "MFU", "tokens/s/GPU", "hours", "GPU-hours"]
        yield f"## {model}\n\n{markdown(header, rows)}\n"
    yield finetune_section()
    recipe = load_recipe(Path("examples/eagle2-9b/recipe.yaml"))
    stages = {name: recipe.stage(name) for name in PUBLISHED}
    rows = []
    for used in software(hardware):
        cells = [matching_tokens(recipe, stage, hardware, used) for stage in stages.values()]
        inside = all(cell is not None for cell in cells)
        found = ["-" if cell is None else f"{cell:,.0f}" for cell in cells]
        rows.append([f"{used.efficiency:.0%}", f"{used.traffic / 1e9:.0f}", *found, "yes" if inside else ""])
    yield (
        "## The published hours of Eagle 2\n\n"
        "Samples, GPUs and hours of Eagle2-9B's stages are published (arXiv 2501.14818), tokens per sample are not.\n"
        f"Bracket: {BRACKET[0]:,.0f} to {BRACKET[1]:,.0f}. An image costs 256 tokens a tile: a 2 x 2 grid with its\n"
        "thumbnail and a short text make the lower end; twelve tiles, the thumbnail and a long text the upper one,\n"
        "which is also what a pack of stage 1 holds.\n\n"
        "Computed for what the released code does: ZeRO-3, whole layers recomputed, no other parallelism. Unknown are\n"
        "also two numbers of that software: which share of the planner's achievable rates it reached, and how fast\n"
        "ZeRO-3 moved weights over the time that computing did not hide (328 GB/s are rings through all eight\n"
        "adapters of a node, 41 GB/s through one). Below, the tokens per sample at which each published time comes\n"
        "out; a dash means at none in the bracket. Three times cannot fix five numbers; the last column says which\n"
        "pairs explain all three.\n"
    )
    header = ["share of the rates", "ZeRO-3 GB/s", *(f"{n}: {p.gpus} x {p.hours:g} h" for n, p in PUBLISHED.items())]
    yield markdown([*header, "all inside"], rows)
    chosen = Software(0.4, link_rate(hardware, 256))
    rows = []
    for name, stage in stages.items():
        published = PUBLISHED[name]
        tokens = matching_tokens(recipe, stage, hardware, chosen)
        hours, mfu = as_published(recipe, stage, hardware, tokens, chosen)
        plan, _ = best(recipe, stage, published.gpus, hardware, Mix(tokens))
        own = plan.hours(published.samples)
        rows.append(
            [
                name,
                f"{published.samples / 1e6:.1f} M",
                f"{published.gpus} x {published.hours:g} h",
                f"{tokens:,.0f}",
                f"{hours:.1f}",
                f"{mfu:.0%}",
                f"{describe_layout(plan.layout)}, {plan.recompute}",
                f"{plan.mfu:.0%}",
                f"{own:.1f}",
                f"{published.gpus * published.hours:,.0f}",
                f"{published.gpus * own:,.0f}",
            ]
        )
    yield (
        f"\nWith {chosen.efficiency:.0%} of the rates and {chosen.traffic / 1e9:.0f} GB/s, and what the fastest of "
        "the layouts above would need for\nthe same samples on the same GPUs, at the planner's own rates, which no "
        "GPU has confirmed for this code:\n"
    )
    header = [
        "stage",
        "samples",
        "published",
        "tokens a sample",
        "hours so",
        "MFU so",
        "layout instead",
        "MFU",
        "hours",
    ]
    yield markdown([*header, "published GPU-hours", "instead"], rows)


def main():
    """Write the page to the path that was given."""
    install()
    write_heads()
    text = "\n".join(page())
    Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
