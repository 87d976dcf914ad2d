"""Files that come with the package and are named on the command line: recipes, cluster profiles, batch scripts.

Recipes and batch scripts lie at the top of the repository (``examples/``, ``slurm/``), where people look for them, and
setup.py puts them into the installed package. Hence the one question asked here: installed, or a checkout?

One rule holds for every argument that takes a file or the name of one that comes along, see ``file_or_name``.
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Literal

from megatron_eagle.config.schema import meant
from megatron_eagle.errors import UserError

Folder = Literal["recipes", "slurm"]
_IN_A_CHECKOUT: dict[Folder, str] = {"recipes": "examples", "slurm": "slurm"}


def shipped_folder(name: Folder) -> Path:
    """The folder as it lies in the installed package, or else at the top of the checkout."""
    package = Path(str(resources.files("megatron_eagle")))
    installed = package / name
    return installed if installed.is_dir() else package.parent / _IN_A_CHECKOUT[name]


def shipped_recipes() -> dict[str, Path]:
    """name -> recipe file, of the recipes that come with the package (``eagle2-9b``, ``tiny``, ...)."""
    folder = shipped_folder("recipes")
    files = sorted([*folder.glob("*/recipe.yaml"), *folder.glob("finetune/*/recipe.yaml")])
    return {file.parent.name: file for file in files}


def file_or_name(given: str | Path, kind: str, shipped: Mapping[str, Path]) -> Path:
    """The file ``given`` or, where it is a name of ``shipped``, that one; ``kind`` is what messages call it.

    With a slash it is a file. A bare word is a name if there is one, otherwise a file of the current folder. If it is
    both, neither wins: the same command would do something else in the next folder. UserError then, and where it is
    neither; the message lists the names.
    """
    text, path = str(given), Path(given)
    if "/" in text:
        return path
    if text not in shipped:
        if path.is_file():
            return path
        raise UserError(
            f"there is no {kind} '{text}': give a file, or one of {', '.join(sorted(shipped))}{meant(text, shipped)}"
        )
    if path.is_file():
        raise UserError(
            f"{kind} '{text}' is also a file of this folder: for the file give its whole path, or rename it"
        )
    return shipped[text]
