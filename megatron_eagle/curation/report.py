"""report.html: the funnel of every source, and what each rule changed or took away, shown with the pictures.

The page holds its pictures itself and links to nothing. It is laid out by ``report.html.j2``.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from megatron_eagle.curation.plan import Plan
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.images import decode_image
from megatron_eagle.errors import BrokenSample
from megatron_eagle.pages import data_uri, render, write

if TYPE_CHECKING:
    from megatron_eagle.curation.output import Summary

REPORT_FILE = "report.html"
SHOWN = 3  # examples of a reason
SIDE = 160  # pixels of a picture


@dataclass(frozen=True)
class Example:
    """A sample that an operator changed, rejected or left, or that it shows. turns: (role, text).

    images: path, offset, size of each. rank: highest first; of samples that are shown, none of which is left out.
    gallery: of its reason, shown by itself.
    """

    source: str
    operator: str
    decision: str
    reason: str
    detail: str
    id: str
    turns: list[tuple[str, str]]
    images: list[tuple[str, int, int]]
    text: str | None = None
    turn: int | None = None
    rank: float | None = None
    gallery: str = ""


@dataclass(frozen=True)
class Shown:
    """Examples of one reason of one operator, or of one gallery of it."""

    operator: str
    decision: str
    reason: str
    gallery: str
    samples: int
    examples: list[Example]


def write_report(folder: Path, plan: Plan, summary: "Summary", examples: Sequence[Example]) -> None:
    """Writes ``folder/report.html``."""
    steps = ["read", *(step.operator.name for step in plan.steps)]
    page = render(
        "megatron_eagle.curation:report.html.j2",
        plan=plan,
        summary=summary,
        steps=steps,
        funnels=[_funnel(steps, source) for source in summary.sources],
        shown=_chosen(steps, summary, examples),
        picture=_picture,
    )
    write(page, folder / REPORT_FILE)


def _funnel(steps: Sequence[str], source: Any) -> list[int]:
    """Samples that are left after each step."""
    left = source.read
    found = []
    for step in steps:
        left -= source.gone.get(step, 0)
        found.append(left)
    return found


def _chosen(steps: Sequence[str], summary: "Summary", examples: Sequence[Example]) -> list[Shown]:
    """The first few examples of each reason, in the order of the plan; of different sources where there are."""
    groups: dict[tuple[str, str, str, str], list[Example]] = {}
    for example in examples:
        group_of = (example.operator, example.decision, example.reason, example.gallery)
        groups.setdefault(group_of, []).append(example)
    shown = []
    for (operator, decision, reason, gallery), group in groups.items():
        firsts = {example.source: example for example in reversed(group)}
        chosen = [*firsts.values(), *(one for one in group if one not in firsts.values())][:SHOWN]
        if group[0].rank is not None:
            chosen = sorted(group, key=lambda one: -(one.rank or 0.0))
        key = f"{operator}: {reason} ({decision})"
        many = len(group) if gallery else sum(source.reasons.get(key, 0) for source in summary.sources)
        shown.append(Shown(operator, decision, reason, gallery, many, chosen))
    return sorted(shown, key=lambda one: (steps.index(one.operator), one.decision, one.reason, one.gallery))


def _picture(place: tuple[str, int, int]) -> Markup:
    """A small copy of an image as a data URI; empty if it cannot be read."""
    path, offset, size = place
    try:
        image = decode_image(FileSlice(Path(path), offset, size).read())
    except (BrokenSample, OSError):
        return Markup("")
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return data_uri("image/jpeg", data.getvalue())
