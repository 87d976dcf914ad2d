"""Predicted against measured seconds of a step, in layouts that two processes on this machine can really run.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py benchmarks/reports [--short]

One short run calibrates a hardware profile (``measuring/calibrate.py``); with it every layout is planned and then
trained. Writes <date>-step-time.md and the profile. Give the machine nothing else to do meanwhile.
"""

import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megatron_eagle.compat.platform import install
from megatron_eagle.config.recipe import Recipe
from megatron_eagle.measuring.bench import Measurement, run_bench
from megatron_eagle.measuring.calibrate import calibrate
from megatron_eagle.parallel.process_pool import World
from megatron_eagle.planning.activations import PackShape
from megatron_eagle.planning.hardware import hardware_as_yaml, load_hardware
from megatron_eagle.planning.plan import describe_layout
from megatron_eagle.planning.report import markdown
from megatron_eagle.planning.samples import Given

LENGTH = 1024
LANGUAGE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}


def pack(tiles: int, *segments: int) -> PackShape:
    """The rest of the pack is padding."""
    padding = LENGTH - sum(segments)
    return PackShape((*segments, padding) if padding else segments, tiles, padding)


BALANCED = Given((pack(24, 256, 256, 256, 200),))
# Even packs, which the first of two replicas gets, hold most tiles, but not all.
LOPSIDED = Given(
    (
        pack(60, 1000),
        pack(0, *[64] * 16),
        pack(48, 512, 500),
        pack(6, 128, 512, 300),
        pack(54, 900),
        pack(0, 1024),
        pack(12, 256, 300),
        pack(30, 512, 512),
    )
)
PP = {"pp": 2}
CASES: list[tuple[str, dict[str, Any], Given, str]] = [
    ("balanced", PP, BALANCED, "none"),
    ("lopsided", PP, LOPSIDED, "none"),
    ("balanced", {**PP, "layers_per_stage": [1, 3]}, BALANCED, "none"),
    ("balanced", {**PP, "encoder": "spread"}, BALANCED, "none"),
    ("lopsided", {**PP, "encoder": "spread"}, LOPSIDED, "none"),
    ("balanced", {}, BALANCED, "none"),
    ("lopsided", {}, LOPSIDED, "none"),
    ("lopsided", {"encoder": "spread"}, LOPSIDED, "none"),
    ("lopsided", {**PP, "encoder": "spread"}, LOPSIDED, "full"),
    ("balanced", {"tp": 2, "sequence_parallel": True}, BALANCED, "none"),
]


def recipe_of(layout: dict[str, Any], recompute: str, batch: int) -> Recipe:
    """The tiny model with a language model that is worth timing."""
    stage = {
        "name": "all",
        "trainable": ["vision", "connector", "language"],
        "steps": 10,
        "pack_length": LENGTH,
        "batch": batch,
        "learning_rate": 1e-3,
        "blend": [{"path": "none"}],
    }
    settings = {
        "name": "step-time",
        "model": {"preset": "tiny", "language": LANGUAGE, "recompute": recompute},
        "tokenizer": {"kind": "sentencepiece", "path": "none"},
        "precision": "fp32",
        "layout": layout,
        "stages": [stage],
    }
    return TypeAdapter(Recipe).validate_python(settings)


def processor() -> str:
    """What Linux calls the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "this machine")


def _label(recipe: Recipe, packs: str, recompute: str) -> str:
    layout = recipe.layout
    layers = f" layers {'-'.join(map(str, layout.layers_per_stage))}" if layout.layers_per_stage else ""
    extra = " recompute full" if recompute == "full" else ""
    return f"dp={layout.data_parallel_size(2)} {describe_layout(layout)}{layers}, {packs}{extra}"


def main(folder: Path, short: bool) -> None:
    """Calibrate, then run all cases."""
    platform, world, started = install(), World(2), time.perf_counter()
    whole = recipe_of({}, "none", 2)
    hardware = world.run(calibrate, whole, whole.stages[0], platform, load_hardware("cpu"), timeout=300)[0]
    print(f"calibrated in {time.perf_counter() - started:.0f} s: {hardware.sources['products']}", flush=True)
    rows = []
    for packs, layout, shapes, recompute in CASES[:2] if short else CASES:
        recipe = recipe_of(layout, recompute, batch=8)
        steps = 1 if short else 3
        arguments = (recipe, recipe.stages[0], platform, hardware, shapes, steps)
        measured: Measurement = world.run(run_bench, *arguments, timeout=300)[0]
        seconds = statistics.median(measured.seconds)
        rows.append(
            [
                describe_layout(recipe.layout)
                + f" {packs}"
                + (f" recompute {recompute}" if recompute != "none" else ""),
                f"{seconds:.3f}",
                f"{measured.predicted_seconds:.3f}",
                f"{measured.predicted_seconds / seconds - 1:+.1%}",
                f"{measured.peak_bytes / 1e6:.1f}",
                f"{measured.predicted_bytes / 1e6:.1f}",
                f"{measured.predicted_bytes / measured.peak_bytes - 1:+.1%}",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    world.stop()
    header = ["layout, packs", "step s", "planned s", "error", "peak MB, rank 0", "planned MB", "error"]
    table = markdown(header, rows)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{date}-step-time.yaml").write_text(hardware_as_yaml(hardware), encoding="utf-8")
    text = (
        f"# Seconds of a step, planned and measured, {date}\n\n"
        "`OMP_NUM_THREADS=1 python benchmarks/step_time.py benchmarks/reports`, two processes on two cores of "
        f"{processor()}, one thread each, gloo, fp32; 8 packs of {LENGTH} tokens a step; "
        "median of three steps behind one that warms up. "
        f"Calibration: {hardware.sources['products']}.\n\n{table}\n"
    )
    (folder / f"{date}-step-time.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--short" in sys.argv)
