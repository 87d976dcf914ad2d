"""The demo with few samples and two steps a stage."""

from dataclasses import replace
from pathlib import Path

import yaml
from project import ROOT

from megatron_eagle.demo.run import SETS

RECIPE = ROOT / "examples" / "tiny" / "recipe.yaml"
FEW = tuple(replace(part, samples=min(part.samples // 40, 60)) for part in SETS)


def short_recipe(folder: Path) -> Path:
    """The demo's own recipe with two steps a stage and its data below ``folder``."""
    recipe = yaml.safe_load(RECIPE.read_text().replace("runs/demo", str(folder / "runs" / "demo")))
    for stage in recipe["stages"]:
        stage["steps"] = 2
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
