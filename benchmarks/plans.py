"""Writes docs/plans.md: what the published models need on 8 to 256 H100, and their published hours.

    python benchmarks/plans.py docs/plans.md

Of a few layouts, each with and without recomputation, the fastest that fits is shown.
"""

import sys
from pathlib import Path

from megatron_eagle.errors import UserError
from megatron_eagle.layout import Layout
from megatron_eagle.platform import install

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


def page():
    """The page, part by part."""
    from megatron_eagle.planning.hardware import load_hardware
    from megatron_eagle.planning.plan import describe_layout
    from megatron_eagle.planning.published import BRACKET, PUBLISHED, as_published, matching_tokens
    from megatron_eagle.planning.report import assumptions, markdown
    from megatron_eagle.planning.samples import Mix
    from megatron_eagle.recipe import load_recipe

    hardware, mix = load_hardware("h100"), Mix()
    yield "# Plans of the published models on H100\n"
    yield (
        "Computed, not measured: `python benchmarks/plans.py docs/plans.md` writes this page; see docs/planning.md.\n\n"
        f"{assumptions(hardware, mix)} Hours are for the steps of `examples/*/recipe.yaml`. Layouts are the\n"
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
    recipe = load_recipe(Path("examples/eagle2-9b/recipe.yaml"))
    rows = []
    for name, published in PUBLISHED.items():
        stage = recipe.stage(name)
        hours = [f"{as_published(recipe, stage, hardware, Mix(tokens)):.1f}" for tokens in (*BRACKET, 2000)]
        matches = [matching_tokens(recipe, stage, hardware, hidden) for hidden in (0.0, 0.5, 1.0)]
        rows.append(
            [
                name,
                f"{published.samples / 1e6:.1f} M",
                f"{published.gpus} x {published.hours:g} h",
                hours[0],
                hours[2],
                hours[1],
                " / ".join("-" if value is None else f"{value:,.0f}" for value in matches),
            ]
        )
    yield (
        "## The published hours of Eagle 2\n\n"
        "Tokens per sample are not published. With ZeRO-3 as in the released code, half of its traffic hidden,\n"
        "recomputation of whole layers and no other parallelism, Eagle2-9B would take the hours below for samples of\n"
        "1500, 2000 and 4000 tokens. The last column is the length at which the published hours come out, "
        "with none / half / all of the\n"
        "traffic hidden; a dash means at no length between 500 and 8000.\n"
    )
    yield markdown(["stage", "samples", "published", "h at 1500", "h at 2000", "h at 4000", "tokens that match"], rows)


def main():
    """Write the page to the path that was given."""
    install()
    text = "\n".join(page())
    Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
