"""The names that ``reading.packing`` may hold: one for each file of ``data/order/rules``.

A recipe with a misspelt rule is refused when it is read. Nothing is imported to know the names, so reading a recipe
needs no code of ``data``, and a new rule is known as soon as its file is there.
"""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from megatron_eagle.config.numbers import shown
from megatron_eagle.config.schema import meant

_FOLDER = Path(__file__).parents[1] / "data" / "order" / "rules"


def packing_rules() -> tuple[str, ...]:
    """Names of the packing rules there are, in alphabetical order."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.py") if not file.stem.startswith("_")))


def known_rule(name: str) -> str:
    """``name`` itself; ValueError with those there are if it is none of them."""
    if name not in packing_rules():
        names = f"{', '.join(packing_rules())}{meant(name, packing_rules())}"
        raise ValueError(f"packing rule {shown(name)} does not exist; there are {names}")
    return name


PackingName = Annotated[str, AfterValidator(known_rule)]
