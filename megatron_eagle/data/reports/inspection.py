"""What a model will see of a stage: its lengths as numbers and plots, and sample tiles with their text, on one page.

All numbers come from the sample_index, so a large data set is looked at in seconds; only the samples shown are read.
"""

import base64
import html
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from megatron_eagle.data.order.plan import Plan
from megatron_eagle.data.order.sample_index import Ints
from megatron_eagle.data.sample.budget import degrade_report
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.data.stream.pack_reader import PackReader

SHOWN_SIDE = 112  # pixels of a tile on the page
CONTACT_COLUMNS = 7


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


def draw(views: list[SourceView], padding: Ints, path: Path) -> None:
    """A PNG of histograms: tokens, tiles and frames of a sample, width / height of pictures, padding of packs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 5, figsize=(21, 3.8), layout="constrained")
    names = [Path(view.name).name for view in views]
    for axis, label, values in (
        (axes[0], "tokens of a sample", [view.tokens for view in views]),
        (axes[1], "tiles of a sample", [view.tiles for view in views]),
        (axes[2], "frames of a sample with videos", [view.frames[view.frames > 0] for view in views]),
        (axes[3], "width / height of an image or video", [view.aspect_ratios for view in views]),
        (axes[4], "padding of a pack, tokens", [padding]),
    ):
        for name, own in zip(names if len(values) == len(names) else [""], values, strict=False):
            axis.hist(own, bins=40, histtype="step", label=name)
        axis.set(xlabel=label, yscale="log")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write_page(plan: Plan, folder: Path, shown: int) -> list[SourceView]:
    """Writes ``lengths.png`` and ``index.html`` to ``folder``; shows the first ``shown`` samples of the plan."""
    settings, tokenizer = plan.settings, plan.tokenizer
    views = view_sources(plan)
    folder.mkdir(parents=True, exist_ok=True)
    packs = range(plan.first_of_epoch(1))
    useful = np.array([sum(sample.tokens for sample in plan.pack(number).samples) for number in packs])
    padding = settings.pack_length - useful
    draw(views, padding, folder / "lengths.png")
    reader, number = PackReader(settings, tokenizer), 0
    blocks: list[str] = []
    while len(blocks) < shown:
        blocks += _samples(reader[plan.pack(number)], tokenizer)
        number += 1
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in view.row())}</tr>" for view in views)
    report = degrade_report({view.name: view.outcomes for view in views})
    degraded = "".join(f"<li>{html.escape(line)}</li>" for line in report)
    rejected = [reason for view in views for reason in view.rejected]
    page = f"""<!doctype html><meta charset="utf-8"><title>What the model sees</title>
<style>
body {{ font: 15px sans-serif; max-width: 1100px; margin: 2em auto; color: #222 }}
td, th {{ padding: 2px 12px 2px 0; text-align: left }}
img {{ max-width: 100% }}
pre {{ white-space: pre-wrap; background: #f4f4f4; padding: 8px }}
</style>
<h1>What the model sees</h1>
<p>Packs of {settings.pack_length} tokens, {len(packs)} in the first epoch;
{padding.sum() / (useful + padding).sum():.2%} of their tokens are padding.</p>
<table><tr>{"".join(f"<th>{head}</th>" for head in HEADS)}</tr>{rows}</table>
<img src="data:image/png;base64,{base64.b64encode((folder / "lengths.png").read_bytes()).decode()}" alt="histograms">
<h2>Degraded or dropped</h2><ul>{degraded}</ul>
<h2>Rejected: {len(rejected)}</h2><ul>{"".join(f"<li>{html.escape(reason)}</li>" for reason in rejected[:50])}</ul>
<h2>Samples</h2>{"".join(blocks[:shown])}
"""
    (folder / "index.html").write_text(page, encoding="utf-8")
    return views


def _samples(batch: PackedBatch, tokenizer: Tokenizer) -> list[str]:
    """One block of the page for each sample of a pack; text is decoded from the very tokens that are trained on."""
    borders = batch.borders
    blocks = []
    for sample_id, start, end in zip(batch.sample_ids, borders, borders[1:], strict=False):
        own = (batch.tile_slots >= start) & (batch.tile_slots < end)
        text = html.escape(tokenizer.decode(batch.tokens[start:end].tolist()))
        labels = batch.labels[start:end]
        answer = html.escape(tokenizer.decode(labels[labels != IGNORE_LABEL].tolist()))
        tiles = batch.tiles[own]
        picture = f'<img src="data:image/png;base64,{_contact_sheet(tiles)}" alt="tiles">' if len(tiles) else ""
        blocks.append(
            f"<h3>{html.escape(sample_id)}</h3><p>{end - start} tokens, {len(tiles)} tiles</p>{picture}"
            f"<pre>{text}</pre><p>Learned:</p><pre>{answer}</pre>"
        )
    return blocks


def _contact_sheet(tiles: Tensor) -> str:
    """All tiles of a sample beside one another, as base64 PNG."""
    rows = -(-len(tiles) // CONTACT_COLUMNS)
    sheet = Image.new("RGB", (CONTACT_COLUMNS * (SHOWN_SIDE + 4), rows * (SHOWN_SIDE + 4)), "white")
    for number, tile in enumerate(tiles):
        small = Image.fromarray(tile.permute(1, 2, 0).numpy()).resize((SHOWN_SIDE, SHOWN_SIDE))
        sheet.paste(small, (number % CONTACT_COLUMNS * (SHOWN_SIDE + 4), number // CONTACT_COLUMNS * (SHOWN_SIDE + 4)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
