"""The pages of a curation and of benchmarks, and that every page begins with the shared template."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import ask_page, assert_fits
from PIL import Image
from project import ROOT

from megatron_eagle.curation.report import Example, write_report
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark
from megatron_eagle.evaluation.benchmarks.page import Example as Answered
from megatron_eagle.evaluation.benchmarks.page import Section, _picture, write_page
from megatron_eagle.evaluation.benchmarks.scoring import Result
from megatron_eagle.evaluation.benchmarks.table import find_benchmark

LONG = "a-name-without-spaces" * 6


def test_every_page_begins_with_the_shared_template() -> None:
    pages = [file for file in (ROOT / "megatron_eagle").rglob("*.html.j2") if file.parent.name != "pages"]
    begins = '{% extends "megatron_eagle.pages:base.html.j2" %}\n'
    assert [file.name for file in pages if not file.read_text(encoding="utf-8").startswith(begins)] == []
    assert len(pages) >= 7


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (300, 200), "teal").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def curation_page(folder: Path, picture: Path) -> Path:
    """Of two sources, with each kind of example, hostile and long texts."""
    gone = {"lengths": 200, "pairs": 250}
    first = SimpleNamespace(name=LONG, category="captions", read=2000, used=1550, gone=gone)
    first.reasons = {"lengths: too long (rejected)": 200, "pairs: " + "same" * 30 + " (rejected)": 250}
    first.notes, first.files = ["a note"], ["x.jsonl: gone"]
    second = SimpleNamespace(name="b", category="ocr", read=0, used=0, gone={}, reasons={}, notes=[], files=[])
    totals = {"read": 2000, "used": 1550, "rejected": 450, "left": 0}
    steps = [SimpleNamespace(operator=SimpleNamespace(name=name)) for name in gone]

    def example(operator: str, decision: str, images: int, **more: object) -> Example:
        turns = [("human", "<script>alert(1)</script> " + "x" * 300), ("gpt", "A picture. " * 9)]
        places = [(str(picture), 0, picture.stat().st_size)] * images
        return Example(LONG, operator, decision, "too long", "d" * 200, LONG, turns, places, **more)  # type: ignore

    shown = [example("lengths", "rejected", 0), example("lengths", "rejected", 3, text="t" * 200)]
    shown += [example("pairs", "noted", 1, rank=0.5, gallery="nearest")] * 3
    summary = SimpleNamespace(sources=[first, second], total=totals.__getitem__)
    write_report(folder, SimpleNamespace(name=LONG, steps=steps), summary, shown)  # type: ignore[arg-type]
    return folder / "report.html"


def benchmarks_page(folder: Path, picture: Path) -> Path:
    """Of every benchmark, the first with examples of all kinds."""
    small = _picture(FileSlice(picture, 0, picture.stat().st_size))
    answers = [
        Answered(LONG, "What? " + "x" * 300, ("seven", "7"), "y" * 300, points, (small,) * 3) for points in POINTS
    ]
    sections = [
        section(one, answers if number == 0 else [])
        for number, one in enumerate(map(find_benchmark, ("docvqa", "mmmu")))
    ]
    write_page(folder / "benchmarks.html", sections, LONG)
    return folder / "benchmarks.html"


POINTS = (1.0, 0.4, None)


def section(benchmark: Benchmark, answers: list[Answered]) -> Section:
    result = Result(
        benchmark=benchmark.name,
        value=88.1,
        questions=5000,
        asked=4997,
        unreadable=3,
        left_out=7,
        undecided=3,
        parts={LONG: 4.0, "": 3.0},
    )
    broken = ((LONG, "torn" * 50),) if answers else ()
    return Section(benchmark, result, 12.5, tuple(answers), tuple(answers), broken, (LONG,), Path(LONG))


def test_texts_of_samples_are_texts(tmp_path: Path, picture: Path) -> None:
    text = curation_page(tmp_path, picture).read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;alert(1)" in text
    assert text.count('src="data:image/jpeg;base64,') == 3 + 3 and "http" not in text
    assert 'class="gallery"' in text and "(noted, 3)" in text


@pytest.mark.slow
def test_charts_stand_on_white_in_the_dark(tmp_path: Path) -> None:
    """Their ink is dark."""
    figure = '<main><div class="card picture"><img alt=""></div><div class="picture"><img alt=""></div></main>'
    page = (ROOT / "megatron_eagle" / "pages" / "base.html.j2").read_text(encoding="utf-8")
    style = page.split("<style>")[1].split("{% block")[0].replace("(prefers-color-scheme: dark)", "all")
    (tmp_path / "page.html").write_text(f"<html><style>{style}</style><body>{figure}</body></html>", encoding="utf-8")
    script = "return [...document.querySelectorAll('.picture')].map(one => getComputedStyle(one).backgroundColor);"
    assert ask_page(tmp_path / "page.html", script, tmp_path) == ["rgb(255, 255, 255)"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("page", [curation_page, benchmarks_page])
def test_they_fit_a_narrow_window(page: object, tmp_path: Path, picture: Path) -> None:
    assert_fits(page(tmp_path, picture), tmp_path)  # type: ignore[operator]
