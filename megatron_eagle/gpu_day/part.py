"""What a part of a GPU day is given and what it hands back, and which parts there are."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_eagle.compat.platform import Platform, install
from megatron_eagle.errors import UserError
from megatron_eagle.planning.hardware import Hardware, load_hardware, shipped_hardware

PROFILE = "profile.yaml"
UNKNOWN_GPU = "h100"  # whose rates a GPU without a profile is planned with until it is calibrated


@dataclass(frozen=True)
class Setting:
    """folder: where the part may leave files. toy: sizes that a CPU runs, instead of the published models'."""

    folder: Path
    toy: bool

    @cached_property
    def platform(self) -> Platform:
        """Where this process computes."""
        return install()

    @property
    def cuda(self) -> bool:
        return self.platform.device.type == "cuda"

    @property
    def device_name(self) -> str:
        """What its maker calls it."""
        return torch.cuda.get_device_name() if self.cuda else "cpu"

    def hardware(self) -> Hardware:
        """The profile that this day calibrated, or else the one that comes with the package for this device."""
        own = self.folder / PROFILE
        return load_hardware(str(own) if own.exists() else self.shipped_profile())

    def shipped_profile(self) -> str:
        """Its name."""
        if not self.cuda:
            return "cpu"
        device = self.device_name.lower()
        return next((name for name in shipped_hardware() if name in device), UNKNOWN_GPU)


@dataclass(frozen=True)
class Table:
    """Rows of strings, each as long as the header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.header)]
        if wrong:
            raise ValueError(
                f"table '{self.title}' has {len(self.header)} columns, a row has {len(wrong[0])}: {wrong[0]}"
            )


@dataclass(frozen=True)
class Chart:
    """Bars of one quantity, drawn into the day's picture."""

    title: str
    unit: str
    bars: dict[str, float]


@dataclass(frozen=True)
class PartResult:
    """What a part found.

    values: numbers for whoever reads the JSON. skipped: what could not be measured here, each with the reason. wrong:
    what does not hold that should; a speed below an aim is not wrong, ``aims`` say it: (aim, found, whether it is met).
    """

    tables: tuple[Table, ...] = ()
    values: dict[str, Any] | None = None
    charts: tuple[Chart, ...] = ()
    skipped: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    aims: tuple[tuple[str, str, bool], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(raw: dict[str, Any]) -> "PartResult":
        """What ``as_dict`` gave, behind JSON."""
        tables = tuple(
            Table(table["title"], tuple(table["header"]), tuple(tuple(row) for row in table["rows"]))
            for table in raw["tables"]
        )
        aims = tuple((aim, found, bool(met)) for aim, found, met in raw["aims"])
        charts = tuple(Chart(**chart) for chart in raw["charts"])
        return PartResult(tables, raw["values"], charts, tuple(raw["skipped"]), tuple(raw["wrong"]), aims)


class Part(Protocol):
    """What a file of ``parts`` calls ``run``."""

    def __call__(self, setting: Setting) -> PartResult: ...


def part_names() -> tuple[str, ...]:
    """The parts there are, in the order in which they run."""
    folder = Path(__file__).parent / "parts"
    return tuple(sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")))


def part_of(name: str) -> Part:
    """The part of that name; UserError lists those there are."""
    if name not in part_names():
        raise UserError(f"gpu-day has no part '{name}'; there are {', '.join(part_names())}")
    part: Part = import_module(f"megatron_eagle.gpu_day.parts.{name}").run
    return part


def known_parts(names: Sequence[str]) -> tuple[str, ...]:
    """``names``, or all of them if there are none; UserError as ``part_of``."""
    for name in names:
        part_of(name)
    return tuple(names) or part_names()
