"""Which layouts are verified: every option in the rows of a table, all of their product or a covering of all pairs.

The quick table holds every pair of option values that can occur together (pairwise covering); most mistakes of
parallel code need two options to meet. The whole table is the product.
"""

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig, check_layout
from megatron_eagle.config.presets import SMALLEST as CONFIG
from megatron_eagle.verification.packs import Packing

PACKS_OF_A_STEP = {"packed": 4, "single": 8}
_UNEVEN = {2: (3, 5), 4: (1, 2, 2, 3)}


@dataclass(frozen=True)
class Row:
    """One row of the table: a layout and how it trains. dp, with the layout's sizes, gives the number of processes.

    tuned: with what ``finetuning.py`` adds, everything trainable, the tables' own model.
    """

    tp: int = 1
    sequence_parallel: bool = False
    pp: int = 1
    vpp: int | None = None
    uneven: bool = False
    cp: int = 1
    least_cp: int | None = None
    ulysses: int = 1
    dp: int = 1
    encoder: Literal["tensor", "spread"] = "tensor"
    packing: Packing = "packed"
    recompute: Literal["none", "selective", "full", "offload"] = "none"
    recompute_layers: int | None = None
    distributed_optimizer: bool = True
    overlap: bool = False
    trainable: Literal["all", "connector"] = "all"
    precision: Literal["fp32", "bf16"] = "fp32"
    kernels: Literal["torch", "triton"] = "torch"
    lora: bool = False
    tuned: bool = False

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def layout(self) -> Layout:
        """Raises ValueError for sizes that no layout can have."""
        return Layout(
            tp=self.tp,
            sequence_parallel=self.sequence_parallel,
            pp=self.pp,
            vpp=self.vpp,
            layers_per_stage=_UNEVEN[self.pp] if self.uneven else None,
            cp=self.cp,
            least_cp=self.least_cp,
            ulysses=self.ulysses,
            encoder=self.encoder,
        )

    def describe(self) -> str:
        """The row in the words of a recipe, without what is at its default."""
        said = []
        for item in fields(self):
            value = getattr(self, item.name)
            if value == item.default:
                continue
            words = {True: item.name, False: f"no {item.name}"}.get(value) if isinstance(value, bool) else None
            said.append(words or f"{item.name}={value}")
        return " ".join(said) or "one process"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "processes": self.processes}


OPTIONS: dict[str, Sequence[Any]] = {
    "tp": (1, 2, 4),
    "sequence_parallel": (False, True),
    "pp": (1, 2, 4),
    "vpp": (None, 2),
    "uneven": (False, True),
    "cp": (1, 2, 4),
    "least_cp": (None, 1),
    "ulysses": (1, 2),
    "dp": (1, 2, 4),
    "encoder": ("tensor", "spread"),
    "packing": ("packed", "single"),
    "recompute": ("none", "selective", "full", "offload"),
    "recompute_layers": (None, 1),
    "distributed_optimizer": (True, False),
    "overlap": (False, True),
    "trainable": ("all", "connector"),
    "precision": ("fp32", "bf16"),
}


def possible(row: Row, config: EagleConfig = CONFIG) -> bool:
    """Whether a row makes sense: a layout that the model accepts, and options that do something."""
    if row.uneven and (row.pp == 1 or row.vpp):
        return False
    if row.vpp and (PACKS_OF_A_STEP[row.packing] // row.dp) % row.pp:
        return False  # the interleaved schedule works in rounds of pp microbatches
    if row.recompute_layers and row.recompute != "full":
        return False
    if row.encoder == "spread" and row.tp * row.pp * row.cp == 1:
        return False
    try:
        check_layout(config, row.layout())
    except ValueError:
        return False
    return True


def whole_table(processes: int) -> list[Row]:
    """Every possible row of at most ``processes`` processes, smallest first."""
    axes = ("tp", "pp", "cp", "dp")
    others = [name for name in OPTIONS if name not in axes]
    sizes = [own for own in itertools.product(*(OPTIONS[axis] for axis in axes)) if math.prod(own) <= processes]
    rest = [dict(zip(others, own, strict=True)) for own in itertools.product(*(OPTIONS[name] for name in others))]
    rows = (Row(**dict(zip(axes, own, strict=True)), **more) for own in sizes for more in rest)
    return sorted((row for row in rows if possible(row)), key=lambda row: row.processes)


def quick_table(processes: int, seed: int = 0) -> list[Row]:
    """Few rows that hold every pair of option values that any row of the whole table holds (greedy covering)."""
    rows = whole_table(processes)
    random.Random(seed).shuffle(rows)
    pairs = {row: _pairs(row) for row in rows}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        # Looking at a sample is enough: the covering stays small, and the product has some hundred thousand rows.
        candidates = random.Random(len(missing)).sample(rows, min(len(rows), 400))
        best = max(candidates, key=lambda row: (len(pairs[row] & missing), -row.processes))
        if not pairs[best] & missing:
            best = next(row for row in rows if pairs[row] & missing)
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen, key=lambda row: row.processes)


def _pairs(row: Row) -> frozenset[tuple[tuple[str, Any], tuple[str, Any]]]:
    values: Iterable[tuple[str, Any]] = ((item.name, getattr(row, item.name)) for item in fields(row))
    return frozenset(itertools.combinations(values, 2))
