"""Histograms and stacked bars as numbers; a template draws boxes, so that text keeps its size on any screen."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 40
LOGARITHMIC_FROM = 50  # largest over smallest value


@dataclass(frozen=True)
class Part:
    """A piece of a bar: its width in percent of the whole axis, and what it is."""

    width: float
    title: str


@dataclass(frozen=True)
class Row:
    """A bar with a name and what it adds up to."""

    name: str
    parts: tuple[Part, ...]
    total: str
    good: bool = True


@dataclass(frozen=True)
class Bar:
    """range: its values in words. height: 0 to 1, of the tallest bar of the chart."""

    range: str
    count: int
    height: float


@dataclass(frozen=True)
class Strip:
    """The values of one series. summary: how many there are and their middle, in words."""

    name: str
    summary: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Histogram:
    """Strips over one axis. ticks: its lowest, middle and highest value."""

    title: str
    strips: tuple[Strip, ...]
    ticks: tuple[str, ...]
    logarithmic: bool


def histogram(title: str, series: Mapping[str, ArrayLike]) -> Histogram | None:
    """The distribution of each series, as shares of its own values so that large and small ones compare.

    Few whole numbers have a bar each; values that span a factor of 50 are divided by their logarithm. A series without
    values is left out; without any there is no histogram.
    """
    given = {name: np.asarray(values, dtype=np.float64) for name, values in series.items()}
    kept = {name: values for name, values in given.items() if values.size}
    if not kept:
        return None
    low, high = min(v.min() for v in kept.values()), max(v.max() for v in kept.values())
    whole = all(np.array_equal(values, np.rint(values)) for values in kept.values())
    edges, logarithmic = _edges(float(low), float(high), whole)
    counts = {name: np.histogram(values, edges)[0] for name, values in kept.items()}
    tallest = max(float(own.max() / own.sum()) for own in counts.values())
    ends = [*edges[1:-1], np.nextafter(edges[-1], np.inf)]  # the last bar has its end, too
    ranges = [_range(a, b, whole) for a, b in zip(edges[:-1], ends, strict=True)]
    strips = tuple(
        Strip(
            name,
            f"{kept[name].size:,}, median {_number(float(np.median(kept[name])))}",
            tuple(
                Bar(words, int(count), float(count / own.sum()) / tallest)
                for words, count in zip(ranges, own, strict=True)
            ),
        )
        for name, own in counts.items()
    )
    middle = (low * high) ** 0.5 if logarithmic else (low + high) / 2
    ticks = [_number(float(value)) for value in ((low, middle, high) if high > low else (low,))]
    return Histogram(title, strips, tuple(ticks), logarithmic)


def _edges(low: float, high: float, whole: bool) -> tuple[NDArray[np.float64], bool]:
    if whole and high - low < BINS:
        return np.arange(low, high + 2) - 0.5, False
    if low > 0 and high / low >= LOGARITHMIC_FROM:
        return np.geomspace(low, high, BINS + 1), True
    return np.linspace(low, high if high > low else low + 1, BINS + 1), False


def _range(low: float, high: float, whole: bool) -> str:
    if whole:
        first, last = int(np.ceil(low)), int(np.ceil(high)) - 1
        return f"{first:,}" if last <= first else f"{first:,} to {last:,}"
    return f"{_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:.3g}"
