"""What a start of a run was made of, so that a run explains itself: recipe, code, packages, machine and command.

It goes into the start's file (``RUN/starts/<number>``, ``fencing``), into W&B and TensorBoard, and beside the run as
``recipe.yaml``, which is the recipe as it was resolved: with every default and override, ready to be given again.
"""

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import megatron_eagle
from megatron_eagle.config.recipe import Recipe, Stage, recipe_as_yaml
from megatron_eagle.errors import UserError
from megatron_eagle.training.resume_rules import recipe_values

RECIPE_FILE = "recipe.yaml"
PACKAGES = ("megatron-core", "torch", "triton", "transformer-engine", "megatron-energon", "transformers", "numpy")


def origin(recipe: Recipe, stage: Stage, *, step: int, processes: int, device: torch.device) -> dict[str, Any]:
    """All of it as plain data. step: steps that the stage had before this start."""
    return {
        "stage": stage.name,
        "from_step": step,
        "processes": processes,
        "device": _device(device),
        "command": shlex.join(sys.argv),
        "version": megatron_eagle.__version__,
        "commit": commit(),
        "packages": {"python": platform.python_version(), **installed(PACKAGES)},
        "recipe": recipe_values(recipe, stage),
    }


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Version of each of ``packages`` that is installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, with ``+changes`` if files differ from it; None where the code is no checkout."""
    checkout = Path(megatron_eagle.__file__).parents[1]
    if not (checkout / ".git").exists():
        return None
    try:
        head = _git(checkout, "rev-parse", "HEAD")
        return head + ("+changes" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git, somebody else's folder, a slow disk: it is only said
        return None


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write ``recipe.yaml`` into the run's folder, whole or not at all; UserError if the disk refuses."""
    new = folder / f".{RECIPE_FILE}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new.write_text(recipe_as_yaml(recipe), encoding="utf-8")
        os.replace(new, folder / RECIPE_FILE)
    except OSError as error:
        raise UserError(f"cannot write {folder / RECIPE_FILE}: {error.strerror}") from None


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores"
