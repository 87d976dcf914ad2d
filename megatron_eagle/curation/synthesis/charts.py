"""Charts with their tables: bars, grouped and horizontal bars, lines and pies.

Every value is printed where it is drawn, so that what is asked can be read off the picture.
"""

import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_eagle.curation.synthesis.words import MEASURES, SERIES, TOPICS
from megatron_eagle.curation.tables import Table

KINDS = ("bar", "horizontal bar", "grouped bar", "line", "pie")
PALETTES = (
    ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb"),
    ("#332288", "#88ccee", "#44aa99", "#117733", "#ddcc77", "#cc6677", "#882255"),
    ("#222222", "#888888", "#cccccc", "#555555", "#aaaaaa", "#3a3a3a", "#dddddd"),
)


@dataclass(frozen=True)
class Chart:
    """image: RGB. table: of what it shows, rows in the order in which they are drawn."""

    image: Image.Image
    kind: str
    title: str
    table: Table


def draw_chart(kind: str, font: Path, choose: random.Random) -> Chart:
    """A chart of this kind, of numbers at random, written in this font."""
    topic, names = choose.choice(TOPICS)
    measure, least, most, decimals = choose.choice(MEASURES)
    many = choose.randint(3, min(6, len(names)))
    start = choose.randrange(len(names) - many + 1)  # neighbours, for these are years and months
    rows = list(names[start : start + many])
    series = choose.sample(SERIES, choose.randint(2, 3)) if kind == "grouped bar" else [measure]
    values = [[round(choose.uniform(least, most), decimals) for _ in rows] for _ in series]
    cells = [(name, *(f"{one[place]:.{decimals}f}" for one in values)) for place, name in enumerate(rows)]
    title = f"{measure[0].upper()}{measure[1:]} by {topic}"
    table = Table((topic, *series), tuple(cells))
    return Chart(_drawn(kind, font, title, table, values, choose), kind, title, table)


def _drawn(
    kind: str, font: Path, title: str, table: Table, values: list[list[float]], choose: random.Random
) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    words = FontProperties(fname=str(font), size=choose.choice((9, 10, 11)))
    figure = Figure(figsize=(choose.uniform(4.5, 7), choose.uniform(3.2, 5)), dpi=choose.choice((80, 100, 120)))
    FigureCanvasAgg(figure)
    axes, colours = figure.add_subplot(), choose.choice(PALETTES)
    axes.set_title(title, fontproperties=words)
    _DRAW[kind](axes, table, values, colours, words)
    if kind != "pie" and choose.random() < 0.5:
        axes.grid(axis="x" if kind == "horizontal bar" else "y", alpha=0.3)
        axes.set_axisbelow(True)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_fontproperties(words)
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return Image.open(data).convert("RGB")


def _names(table: Table) -> list[str]:
    return [row[0] for row in table.rows]


def _said(table: Table, series: int) -> list[str]:
    return [row[series + 1] for row in table.rows]


def _bars(axes: Any, table: Table, values: list[list[float]], colours: tuple[str, ...], words: Any) -> None:
    places, width = range(len(table.rows)), 0.8 / len(values)
    for number, one in enumerate(values):
        shifted = [place + width * (number - (len(values) - 1) / 2) for place in places]
        drawn = axes.bar(shifted, one, width, color=colours[number], label=table.columns[number + 1])
        axes.bar_label(drawn, _said(table, number), fontproperties=words)
    axes.set_xticks(list(places), _names(table))
    if len(values) > 1:  # in the room above the bars; looking for the best place takes long
        axes.legend(prop=words, loc="upper right", ncols=len(values))
    axes.margins(y=0.15 * len(values))


def _flat_bars(axes: Any, table: Table, values: list[list[float]], colours: tuple[str, ...], words: Any) -> None:
    drawn = axes.barh(_names(table), values[0], color=colours[0])
    axes.bar_label(drawn, _said(table, 0), padding=3, fontproperties=words)
    axes.invert_yaxis()
    axes.margins(x=0.15)


def _lines(axes: Any, table: Table, values: list[list[float]], colours: tuple[str, ...], words: Any) -> None:
    axes.plot(_names(table), values[0], marker="o", color=colours[0])
    for name, value, said in zip(_names(table), values[0], _said(table, 0), strict=True):
        axes.annotate(said, (name, value), (0, 7), textcoords="offset points", ha="center", fontproperties=words)
    axes.margins(y=0.2)


def _pie(axes: Any, table: Table, values: list[list[float]], colours: tuple[str, ...], words: Any) -> None:
    labels = [f"{name}: {said}" for name, said in zip(_names(table), _said(table, 0), strict=True)]
    axes.pie(values[0], labels=labels, colors=colours, textprops={"fontproperties": words}, wedgeprops={"ec": "white"})


_DRAW = {"bar": _bars, "grouped bar": _bars, "horizontal bar": _flat_bars, "line": _lines, "pie": _pie}
