"""A folder of made samples: pictures, and records that ``data build`` and ``curate`` read.

Every sample depends on the seed, its kind and its number alone, so a longer set begins with a shorter one, and any
number of processes writes the same bytes, given the same versions of Pillow and matplotlib and the same fonts.
"""

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.curation.synthesis.charts import KINDS, draw_chart
from megatron_eagle.curation.synthesis.fonts import digest, fonts_by_script
from megatron_eagle.curation.synthesis.noise import LEVELS, spoiled
from megatron_eagle.curation.synthesis.pages import LAYOUTS, draw_page
from megatron_eagle.curation.synthesis.words import SCRIPTS
from megatron_eagle.data.build.worker_pool import WorkerPool
from megatron_eagle.errors import UserError
from megatron_eagle.progress import Progress

IMAGES, SAMPLES_FILE = "images", "samples.jsonl"
QUALITY = 90
READ = (
    "Read all the text in the image.",
    "What does the text say? Write all of it.",
    "Transcribe the text in the image.",
)
TO_TABLE = ("Write the data of this chart as a Markdown table.", "Turn the chart into a table in Markdown.")
SORT = "What type of chart is this?"


@dataclass(frozen=True)
class Synthesis:
    """pages, charts: how many samples of each. scripts: of the pages. folders: with more fonts."""

    seed: int
    pages: int = 0
    charts: int = 0
    scripts: tuple[str, ...] = ("latin", "cyrillic", "greek")
    folders: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        unknown = [script for script in self.scripts if script not in SCRIPTS]
        if unknown or not self.scripts:
            raise UserError(f"script {', '.join(unknown) or 'none'} is not known; there are {', '.join(SCRIPTS)}")
        if self.pages + self.charts < 1:
            raise UserError("neither pages nor charts are wanted")


def synthesise(wanted: Synthesis, out: Path, *, workers: int = 1) -> Path:
    """Writes everything into ``out``, which must be empty or absent; returns the file of records, written last."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not empty; remove it or choose another folder")
    fonts = fonts_by_script(("latin", *wanted.scripts), wanted.folders)
    work = [("page", n) for n in range(wanted.pages)] + [("chart", n) for n in range(wanted.charts)]
    try:
        (out / IMAGES).mkdir(parents=True, exist_ok=True)
        partial = out / f".{SAMPLES_FILE}"
        with open(partial, "w", encoding="utf-8") as file:
            made = _records(wanted, fonts, out, work, workers)
            for record in Progress("drawing", made, total=len(work), unit="samples"):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(partial, out / SAMPLES_FILE)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror or error}") from None
    return out / SAMPLES_FILE


def _records(
    wanted: Synthesis, fonts: dict[str, tuple[Path, ...]], out: Path, work: Sequence[tuple[str, int]], workers: int
) -> Iterator[dict[str, Any]]:
    jobs = [_Job(wanted, fonts, out, kind, number) for kind, number in work]
    if workers == 1:
        yield from map(_make, jobs)
        return
    with WorkerPool(workers) as pool:
        yield from pool.map(_make, jobs, chunksize=32)


@dataclass(frozen=True)
class _Job:
    wanted: Synthesis
    fonts: dict[str, tuple[Path, ...]]
    out: Path
    kind: str
    number: int


def _make(job: _Job) -> dict[str, Any]:
    """Draws one sample, stores its picture, and returns its record."""
    choose = random.Random(f"{job.wanted.seed}/{job.kind}/{job.number}")
    identity = f"{job.kind}-{job.number:07d}"
    record = _page(job, choose, identity) if job.kind == "page" else _chart(job, choose, identity)
    turns = record.pop("asked")
    turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
    values = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"id": identity, **record, "conversations": values}


def _page(job: _Job, choose: random.Random, identity: str) -> dict[str, Any]:
    script, layout, level = choose.choice(job.wanted.scripts), choose.choice(list(LAYOUTS)), choose.choice(LEVELS)
    font = choose.choice(job.fonts[script])
    page = draw_page(layout, script, font, choose)
    name = f"{IMAGES}/{identity}.jpg"
    spoiled(page.image, level, choose).save(job.out / name, "JPEG", quality=choose.choice((QUALITY, 75, 50)))
    known = {"layout": layout, "script": script, "noise": level, "font": font.name, "font_sha256": digest(font)}
    return {"image": name, "task": "ocr", "metadata": known, "asked": [(choose.choice(READ), page.text), *page.asked]}


def _chart(job: _Job, choose: random.Random, identity: str) -> dict[str, Any]:
    kind, font = choose.choice(KINDS), choose.choice(job.fonts["latin"])
    chart = draw_chart(kind, font, choose)
    name = f"{IMAGES}/{identity}.png"
    chart.image.save(job.out / name, "PNG")
    table = {"columns": list(chart.table.columns), "rows": [list(row) for row in chart.table.rows]}
    known = {"chart": kind, "title": chart.title, "table": table, "font": font.name, "font_sha256": digest(font)}
    asked = [(choose.choice(TO_TABLE), chart.table.markdown()), (SORT, f"{kind} chart")]
    return {"image": name, "task": "chart", "metadata": known, "asked": asked}
