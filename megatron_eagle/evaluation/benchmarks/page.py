"""benchmarks.html: the scores beside the published ones, what was right and wrong with pictures, and what is broken.

The page holds its pictures itself and links to nothing. It is laid out by ``page.html.j2``.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.images import decode_image
from megatron_eagle.errors import BrokenSample
from megatron_eagle.evaluation.benchmarks.benchmark import PUBLISHED, PUBLISHED_IN, Benchmark
from megatron_eagle.evaluation.benchmarks.scoring import Result, Scored
from megatron_eagle.pages import data_uri, render, write

SHOWN = 4  # examples of each kind
SIDE = 240  # pixels of a picture
RIGHT = 0.5  # points from which on an answer is shown among the right ones


@dataclass(frozen=True)
class Example:
    """pictures: as data URLs."""

    id: str
    question: str
    references: tuple[str, ...]
    answer: str
    points: float | None
    pictures: tuple[Markup, ...]


@dataclass(frozen=True)
class Section:
    """What the page says of one benchmark. blank: its value with blanked images, None if that was not asked."""

    benchmark: Benchmark
    result: Result
    blank: float | None
    right: tuple[Example, ...]
    wrong: tuple[Example, ...]
    broken: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    submission: Path | None


def section_of(
    benchmark: Benchmark,
    result: Result,
    blank: float | None,
    scored: Sequence[Scored],
    notes: tuple[str, ...],
    submission: Path | None,
) -> Section:
    """Choose examples while the pictures are there: those at equal distances in the file's order."""
    asked = [one for one in scored if one.entry.question is not None]
    right = [one for one in asked if one.points is not None and one.points >= RIGHT]
    wrong = [one for one in asked if one.points is None or one.points < RIGHT]
    broken = tuple((one.entry.id, one.entry.reason) for one in scored if one.entry.question is None)
    return Section(benchmark, result, blank, _chosen(right), _chosen(wrong), broken, notes, submission)


def _chosen(scored: Sequence[Scored]) -> tuple[Example, ...]:
    step = max(1, len(scored) // SHOWN)
    return tuple(_example(one) for one in scored[::step][:SHOWN])


def _example(one: Scored) -> Example:
    question = one.entry.question
    assert question is not None, "examples are of questions that were asked"
    pictures = tuple(_picture(part) for part in question.pictures[:SHOWN])
    return Example(one.entry.id, question.text, question.references, one.answer, one.points, pictures)


def _picture(part: FileSlice) -> Markup:
    """A small JPEG as a data URL, nothing if it cannot be decoded."""
    try:
        image = decode_image(part.read())
    except (OSError, BrokenSample):
        return Markup("")
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return data_uri("image/jpeg", data.getvalue())


def write_page(path: Path, sections: Sequence[Section], checkpoint: str) -> None:
    """Writes the page to ``path``."""
    template = "megatron_eagle.evaluation.benchmarks:page.html.j2"
    page = render(template, sections=sections, models=PUBLISHED, source=PUBLISHED_IN, checkpoint=checkpoint)
    write(page, path)
