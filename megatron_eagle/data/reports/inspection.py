"""What a model will see of a stage: its lengths as numbers and plots, and sample tiles with their text, on one page.

All numbers come from the sample_index, so a large data set is looked at in seconds; only the samples shown are read.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_eagle.data.order.plan import Plan
from megatron_eagle.data.order.sample_index import Ints
from megatron_eagle.data.reports.shown_sample import ShownSample, show_sample
from megatron_eagle.data.sample.budget import degrade_report
from megatron_eagle.data.stream.pack_reader import PackReader
from megatron_eagle.errors import BrokenSample
from megatron_eagle.pages import render, write
from megatron_eagle.pages.charts import histogram


@dataclass(frozen=True)
class SourceView:
    """One data set: samples, how many are used; tokens, tiles, frames of those; width / height of images and videos.

    outcomes: how many are shown whole, degraded and how, or dropped (``lengths.Lengths``).
    """

    name: str
    samples: int
    rejected: list[str]
    tokens: Ints
    tiles: Ints
    frames: Ints
    aspect_ratios: np.ndarray
    outcomes: Counter[str]

    def row(self) -> list[str]:
        """The numbers as texts, in the order of HEADS."""
        spread = [int(np.percentile(self.tokens, q)) for q in (5, 50, 95)] if len(self.tokens) else [0, 0, 0]
        pictures = len(self.aspect_ratios)
        return [
            self.name,
            f"{self.samples} = {len(self.tokens)} + {len(self.rejected)}",
            str(int(self.tokens.sum())),
            " / ".join(map(str, spread)),
            str(pictures),
            f"{self.tiles.sum() / pictures:.1f}" if pictures else "-",
            str(int(self.frames.sum())),
        ]


HEADS = (
    "source",
    "samples = used + rejected",
    "tokens",
    "5 / 50 / 95 % of tokens",
    "images and videos",
    "tiles each",
    "frames",
)


def view_sources(plan: Plan) -> list[SourceView]:
    """The data sets of a plan."""
    views = []
    for sample_index, lengths in zip(plan.sample_indexes, plan.lengths, strict=True):
        used = lengths.tokens > 0
        sizes = np.concatenate([np.asarray(sample_index.image_sizes), np.asarray(sample_index.videos)[:, :2]])
        views.append(
            SourceView(
                name=str(sample_index.path),
                samples=len(lengths.tokens),
                rejected=[f"{sample_index.ids[i]}: {reason}" for i, reason in sorted(lengths.rejected.items())],
                tokens=lengths.tokens[used],
                tiles=lengths.tiles[used],
                frames=lengths.frames[used],
                outcomes=lengths.outcomes,
                aspect_ratios=sizes[:, 0] / sizes[:, 1],
            )
        )
    return views


def quantities(views: list[SourceView], padding: Ints) -> dict[str, Mapping[str, np.ndarray]]:
    """What there is to draw: title -> values of each data set; a quantity that none has is left out."""
    names = [Path(view.name).name for view in views]
    if len(set(names)) < len(names):
        names = [view.name for view in views]
    own = {
        "tokens of a sample": [view.tokens for view in views],
        "tiles of a sample with pictures": [view.tiles[view.tiles > 0] for view in views],
        "frames of a sample with videos": [view.frames[view.frames > 0] for view in views],
        "width / height of an image or video": [view.aspect_ratios for view in views],
    }
    found: dict[str, Mapping[str, np.ndarray]] = {
        title: dict(zip(names, values, strict=True)) for title, values in own.items()
    }
    found["padding of a pack, tokens"] = {"all packs": padding}
    return {title: series for title, series in found.items() if any(len(values) for values in series.values())}


def draw(drawn: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> None:
    """A PNG with a panel for each of ``quantities``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(drawn), 3.8), layout="constrained")
    for axis, (title, series) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        for name, values in series.items():
            if len(values):
                axis.hist(values, bins=40, histtype="step", label=name)
        axis.set(xlabel=title, yscale="log")
        if len(series) > 1:
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def write_page(plan: Plan, folder: Path, shown: int) -> list[SourceView]:
    """Writes ``lengths.png`` and ``index.html`` to ``folder``; shows the first ``shown`` samples of the first epoch."""
    settings = plan.settings
    views = view_sources(plan)
    packs = range(plan.first_of_epoch(1))
    useful = np.array([sum(sample.tokens for sample in plan.pack(number).samples) for number in packs])
    padding = settings.pack_length - useful
    drawn = quantities(views, padding)
    broken: list[str] = []
    page = render(
        "megatron_eagle.data.reports:inspection.html.j2",
        summary=f"{len(packs):,} packs of {settings.pack_length:,} tokens in the first epoch, "
        f"{padding.sum() / (useful + padding).sum():.2%} of them padding.",
        heads=HEADS,
        views=views,
        charts=[chart for title, series in drawn.items() if (chart := histogram(title, series))],
        degraded=degrade_report({view.name: view.outcomes for view in views}),
        samples=list(islice(_samples(plan, packs, broken), shown)),
        rejected=[*(reason for view in views for reason in view.rejected), *broken],
    )
    write(page, folder / "index.html")
    draw(drawn, folder / "lengths.png")
    return views


def _samples(plan: Plan, packs: range, broken: list[str]) -> Iterator[ShownSample]:
    """Samples in the order of the stream; those that cannot be read go to ``broken``."""
    reader = PackReader(plan.settings, plan.tokenizer)
    for number in packs:
        for sample in plan.pack(number).samples:
            try:
                found = reader.read(sample)
            except BrokenSample as error:
                broken.append(f"{sample.id}: {error}")
                continue
            yield show_sample(str(sample.path), *found, plan.settings, plan.tokenizer)
