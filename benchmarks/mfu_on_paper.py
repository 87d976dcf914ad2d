"""Writes what the best plans reach on paper, where their steps go, and what each way to raise them is worth.

    python benchmarks/mfu_on_paper.py benchmarks/mfu_on_paper_2026-11-27.md [COUNT]

COUNT: of the stages below, from the first; by default all, which takes five minutes of a core.

Nothing here is measured by this project: the shares of the peaks are of measurements published elsewhere, named in
the hardware profile. Seconds of the search are processor seconds of this machine.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

from megatron_eagle.compat.platform import install

STAGES = (
    ("eagle2-9b", "stage1.5", 256),
    ("eagle2.5-8b", "stage1.5", 128),
    ("eagle2.5-8b", "stage2", 128),
    ("eagle2.5-8b", "stage3", 128),
    ("eagle2.5-8b", "stage4", 128),
)
SEARCHED = (8, 64, 512, 4096)
ASSUMED = {"convolutions": 0.25, "link_share": 0.7}  # what the profile assumed before 2026-11-27, from no measurement
FREE = {"inside_bytes_per_second": 1e30, "outside_bytes_per_second": 1e30, "latency": 1e-30}


def convolutions(hardware):
    """(share of the peak of ConvNeXt-XXL on H100, that of ConvNeXt-XL and of ViT-L as measured on an RTX 3090,
    seconds a picture of ConvNeXt-XL there as computed, as measured)."""
    from megatron_eagle.model.cost import EncoderRun
    from megatron_eagle.model.encoders.convnext import cost
    from megatron_eagle.model.encoders.convnext.config import KERNEL, STEM, Config
    from megatron_eagle.model.vit import cost as vit
    from megatron_eagle.model.vit.config import VitConfig

    run = EncoderRun(number=2, tp=1, trains=True, repeats_layers=False, in_kernel=True)

    def of(config):  # operations, of them depthwise, element-wise bytes (as ``timing.ELEMENTWISE_PASSES``)
        flops = sum(part.total for part in cost.operations(config))
        side, depthwise = config.image_size // STEM, 0.0
        for number, (depth, size) in enumerate(zip(config.depths, config.hidden_sizes, strict=True)):
            side //= 2 if number else 1
            depthwise += 3 * depth * 2 * side**2 * size * KERNEL**2
        return flops, depthwise, 5 * cost.activations(config, run).saved

    peak, memory, cores = 71e12, 936e9, 35.6e12  # RTX 3090, NVIDIA's GA102 whitepaper
    large = VitConfig(1024, 4096, 24, 16, 224, 16, 1e-5)
    vit_flops = sum(part.total for part in vit.operations(large))
    products = vit_flops / (1 / 117.2 - 5 * vit.activations(large, run).saved / (0.8 * memory))
    flops, depthwise, moved = of(Config(depths=(3, 3, 27, 3), hidden_sizes=(256, 512, 1024, 2048), image_size=224))
    computed = (flops - depthwise) / products + moved / (0.8 * memory) + depthwise / (0.3 * cores)
    measured = flops * 116.37 / peak, vit_flops * 117.2 / peak
    flops, depthwise, moved = of(Config())
    seconds = (flops - depthwise) / (hardware.peak_flops * hardware.products) + depthwise / (0.3 * 67e12)
    seconds += moved / (hardware.memory_bytes_per_second * hardware.memory_share)
    return flops / seconds / hardware.peak_flops, *measured, computed, 1 / 116.37


def best(name, stage, gpus, hardware):
    """(best plan of the search or None, processor seconds)."""
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.planning.samples import Mix
    from megatron_eagle.planning.search import search

    recipe = load_recipe(Path(f"examples/{name}/recipe.yaml"))
    started = time.process_time()
    found = search(recipe, recipe.stage(stage), gpus, hardware, Mix(), keep=1)
    print(name, stage, gpus, f"{time.process_time() - started:.1f} s", flush=True)
    return (found[0] if found else None), time.process_time() - started


def again(name, plan, hardware):
    """The same layout planned with other hardware."""
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.planning.plan import plan_stage
    from megatron_eagle.planning.samples import Mix
    from megatron_eagle.planning.search import with_layout

    recipe = load_recipe(Path(f"examples/{name}/recipe.yaml"))
    variant = with_layout(recipe, plan.stage, plan.layout, plan.recompute, plan.recompute_layers)
    return plan_stage(variant, variant.stage(plan.stage.name), plan.gpus, hardware, Mix(), simulated=1)


def account(name, plan, hardware):
    """(what, seconds) of a step, adding up to all of it; useful operations at the rates that the plan computes with."""
    from megatron_eagle.config.model import encoder_names
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.model.encoders import encoder_cost
    from megatron_eagle.model.flops import connector_flops, encoder_flops, head_flops, layer_flops
    from megatron_eagle.planning.activations import stage_parts

    recipe = load_recipe(Path(f"examples/{name}/recipe.yaml"))
    config, parts, tokens = recipe.model.eagle(), stage_parts(recipe, plan.stage), plan.useful_tokens
    layers = config.language.num_hidden_layers

    def at(flops, share):
        return flops / (plan.gpus * hardware.peak_flops * share)

    core = plan.flops.language.total - layer_flops(config.language, parts, tokens).total * layers
    core -= head_flops(config.language, parts, tokens).total
    rows = [
        ("products of the language model", at(plan.flops.language.total - core, hardware.products)),
        ("its attention", at(core, hardware.attention)),
    ]
    for encoder, settings in zip(encoder_names(config), config.encoders, strict=True):
        share = getattr(hardware, encoder_cost(settings).RATE)
        rows.append((encoder, at(encoder_flops(settings, parts, encoder).total * plan.tiles, share)))
    rows.append(("connector", at(connector_flops(config, parts).total * plan.tiles, hardware.products)))
    quick = again(name, plan, replace(hardware, memory_bytes_per_second=1e30))
    rows.append(("norms, activations, loss: bytes of memory", plan.seconds - quick.seconds - plan.update))
    near = again(name, plan, replace(hardware, **FREE))
    rows.append(("exchanges of tp, cp, pp and tiles", plan.seconds - near.seconds - plan.reduction))
    rows.append(("gradient sums, of what the backward pass does not hide", plan.gradient_sums))
    rows.append(("new weights gathered", plan.reduction - plan.gradient_sums))
    rows.append(("optimizer", plan.update))
    waiting = plan.timeline.bubble * plan.pipeline
    rows.append(("pipeline's bubble", waiting))
    rest = plan.seconds - sum(seconds for _, seconds in rows)
    return [*rows, ("computed again, padding, waiting for the replica with most tiles", rest)]


def page(stages):
    """The report, part by part."""
    from megatron_eagle.planning import search as searching
    from megatron_eagle.planning.hardware import load_hardware
    from megatron_eagle.planning.plan import describe_layout
    from megatron_eagle.planning.report import markdown

    hardware = load_hardware("h100")
    assumed = replace(hardware, **ASSUMED)
    share, convnext, vit, computed, measured = convolutions(hardware)
    yield (
        f"# MFU on paper, 2026-11-27\n\n`python benchmarks/mfu_on_paper.py OUT.md`. MFU counts useful operations of "
        "language model, encoders and connector by real tiles\nand segments, no padding and nothing computed again, "
        "against 989 TFLOP/s.\n\n## ConvNeXt's share\n\n"
        f"timm's table of training on an RTX 3090: ConvNeXt-XL {convnext:.1%} of the peak, ViT-L {vit:.1%}. "
        f"Computed from ViT-L's products, ConvNeXt-XL\ntakes {computed * 1e3:.2f} ms a picture there, "
        f"measured {measured * 1e3:.2f}. The same sum for ConvNeXt-XXL on an H100: {share:.1%} "
        f"(profile: {hardware.convolutions:.0%}; assumed before: {ASSUMED['convolutions']:.0%}).\n\n## Best plans\n"
    )
    rows, plans = [], []
    for name, stage, gpus in stages:
        before, _ = best(name, stage, gpus, assumed)
        ways, searching.LAYERS_AGAIN = searching.LAYERS_AGAIN, ()
        whole, _ = best(name, stage, gpus, hardware)
        searching.LAYERS_AGAIN = ways
        plan, seconds = best(name, stage, gpus, hardware)
        plans.append((name, plan))
        cells = [f"{one.mfu:.1%}" if one else "-" for one in (before, whole, plan)]
        rows.append([f"{name} {stage}", str(gpus), *cells, f"{describe_layout(plan.layout)}, {plan.again}"])
        rows[-1] += [f"{plan.peak / 1e9:.1f}", f"{seconds:.0f}"]
    header = ["stage", "GPUs", "shares as assumed before", "whole layers again, or none", "as searched now"]
    yield markdown([*header, "layout", "GB", "search, CPU s"], rows)
    curve = [(gpus, *best("eagle2-9b", "stage1.5", gpus, hardware)) for gpus in SEARCHED]
    yield "\n## The search, by GPUs: Eagle2-9B stage 1.5\n"
    yield markdown(
        ["GPUs", "best on paper", "layout", "search, CPU s"],
        [
            [str(gpus), *(("-", "nothing fits") if plan is None else (f"{plan.mfu:.1%}", describe_layout(plan.layout)))]
            + [f"{seconds:.1f}"]
            for gpus, plan, seconds in curve
        ],
    )
    for name, plan in plans:
        parts = account(name, plan, hardware)
        yield f"\n## Where a step of {name} {plan.stage.name} goes ({plan.seconds:.2f} s)\n"
        yield markdown(["", "s", "of the step"], [[what, f"{s:.2f}", f"{s / plan.seconds:.1%}"] for what, s in parts])


def main():
    """Write the report to the path that was given."""
    install()
    count = int(sys.argv[2]) if len(sys.argv) > 2 else len(STAGES)
    Path(sys.argv[1]).write_text("\n".join(page(STAGES[:count])) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
