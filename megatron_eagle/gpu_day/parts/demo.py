"""The embedded recipe through its commands, on one process: drawn data, three stages, answers about unseen pictures."""

import json
from dataclasses import replace
from pathlib import Path

import yaml

from megatron_eagle.config.shipped import shipped_recipes
from megatron_eagle.demo.run import SETS, run_demo
from megatron_eagle.gpu_day.part import PartResult, Setting, Table

TOY_SHARE = 40  # of the samples, one in so many
TOY_STEPS = 2
LEAST_SEEN, MOST_BLIND = 0.8, 0.5  # share of the questions right; two CPU processes had 0.91 and 0.30


def run(setting: Setting) -> PartResult:
    """Continues where it was interrupted, as ``megatron-eagle demo``; toy: one stage of two steps on few samples."""
    runs = setting.folder / "runs"
    sets = [replace(one, samples=one.samples // TOY_SHARE) for one in SETS] if setting.toy else SETS
    run_demo(_recipe(setting, runs), (), runs, 1, 0.0, sets)
    summary = json.loads((runs / "demo" / "summary.json").read_text(encoding="utf-8"))
    stages = tuple(
        (one["name"], str(one["steps"]), f"{one['loss_first']:.3f}", f"{one['loss_last']:.3f}")
        for one in summary["stages"]
    )
    seen, blind = summary["accuracy"]["overall"], summary["accuracy"]["blank_images"]
    found = f"{seen:.1%} of the held-out questions right, {blind:.1%} without seeing"
    wrong = [] if setting.toy or (seen >= LEAST_SEEN and blind <= MOST_BLIND) else [found]
    title = f"The embedded recipe: {found}; {summary['seconds']['train']:.0f} s of training"
    return PartResult(
        tables=(Table(title, ("stage", "steps", "first loss", "last loss"), stages),),
        values=summary,
        skipped=("answers of a trained model: toy size",) if setting.toy else (),
        wrong=tuple(wrong),
    )


def _recipe(setting: Setting, runs: Path) -> Path:
    """The shipped recipe with its data below ``runs``, and without its pipeline."""
    said = shipped_recipes()["tiny"].read_text(encoding="utf-8").replace("runs/demo", str(runs / "demo"))
    recipe = yaml.safe_load(said) | {"layout": {}}
    if setting.toy:
        recipe["stages"] = [recipe["stages"][0] | {"steps": TOY_STEPS}]
    path = setting.folder / "demo-recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path
