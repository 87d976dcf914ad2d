"""The demo's report: what summary.json holds, which examples are shown, and a page that needs nothing but itself."""

import base64
import io
import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import assert_fits
from PIL import Image

from megatron_eagle.demo import charts
from megatron_eagle.demo.report import SHOWN_PER_TASK, choose_examples, write_report
from megatron_eagle.demo.summary import (
    Accuracy,
    Example,
    LayoutSummary,
    StageSeconds,
    StageSummary,
    Summary,
    loss_window,
    padding_fraction,
    task_scores,
)
from megatron_eagle.errors import UserError
from megatron_eagle.training.log import StepRecord


def png(width: int, height: int, colour: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(content, "PNG")
    return content.getvalue()


def records(stage: str, losses: list[float]) -> list[StepRecord]:
    return [
        StepRecord(
            stage,
            step,
            len(losses),
            loss,
            1e-3,
            0.7,
            900 + step,
            1000,
            12,
            0.5,
            0.01,
            "digest",
            rejected_total=step // 4,
        )
        for step, loss in enumerate(losses, start=1)
    ]


METRICS = {
    "stage1": records("stage1", [float(12 - step) for step in range(1, 13)]),
    "stage2": records("stage2", [2.0, 1.0, 0.5]),
}


def example(task: str, *, correct: bool, blank_correct: bool = False, **changes) -> Example:
    values = {
        "question": f"What about {task}?",
        "answer": "seven",
        "prediction": "seven" if correct else "nine",
        "blank_prediction": "seven" if blank_correct else "one",
        "images": [png(60, 40, "teal")],
    }
    return Example(task=task, correct=correct, blank_correct=blank_correct, **{**values, **changes})


EXAMPLES = [
    *(example("count", correct=index != 4, blank_correct=index == 0) for index in range(5)),
    example("compare", correct=True, images=[png(30, 30, "red"), png(90, 20, "blue")]),
    example("text $\\only$", correct=True, blank_correct=True, images=[]),
]


def summary(examples: list[Example] = EXAMPLES) -> Summary:
    return Summary(
        stages=[StageSummary.of(METRICS["stage1"], 1234), StageSummary.of(METRICS["stage2"], 5_678_901)],
        layout=LayoutSummary(tp=2, pp=1, cp=1, dp=1, world=2),
        padding_fraction=padding_fraction(record for stage in METRICS.values() for record in stage),
        accuracy=Accuracy.of(examples),
        seconds=StageSeconds(setup=100.0, train=500.5, evaluate=40.0),
        peak_rss_gb=4.25,
    )


class Page(HTMLParser):
    """Text, tags and every address of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.addresses, self.open = "", Counter(), [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        self.tags.update(f"{tag}.{word}" for name, value in attributes if name == "class" for word in value.split())

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


def rendered(folder, examples=EXAMPLES, metrics=METRICS) -> tuple[str, Page]:
    html = write_report(folder, summary(examples), metrics, examples).read_text(encoding="utf-8")
    return html, Page(html)


def test_summary_json_has_exactly_the_promised_keys(tmp_path):
    path = summary().write(tmp_path)
    assert path == tmp_path / "summary.json"
    written = json.loads(path.read_text())
    assert list(written) == ["stages", "layout", "padding_fraction", "accuracy", "seconds", "peak_rss_gb"]
    assert list(written["stages"][0]) == ["name", "steps", "loss_first", "loss_last", "trainable_parameters"]
    assert written["layout"] == {"tp": 2, "pp": 1, "cp": 1, "dp": 1, "world": 2}
    assert written["accuracy"] == {
        "overall": 6 / 7,
        "per_task": {"compare": 1.0, "count": 0.8, "text $\\only$": 1.0},
        "blank_images": 2 / 7,
    }
    assert written["seconds"] == {"setup": 100.0, "train": 500.5, "evaluate": 40.0}
    # 12 and 3 steps of 1000 tokens; 901..912 and 901..903 of them useful.
    assert written["padding_fraction"] == pytest.approx(1 - (12 * 906.5 + 3 * 902) / 15000)


def test_first_and_last_loss_are_means_that_never_overlap():
    long, short = (StageSummary.of(METRICS[stage], 1) for stage in ("stage1", "stage2"))
    assert (long.loss_first, long.loss_last) == ((11 + 10 + 9 + 8 + 7) / 5, (4 + 3 + 2 + 1 + 0) / 5)
    assert (short.loss_first, short.loss_last) == (2.0, 0.5)
    assert (long.steps, short.steps) == (12, 3)
    assert [loss_window(steps) for steps in (1, 2, 3, 4, 9, 10, 1000)] == [1, 1, 1, 2, 4, 5, 5]


def test_numbers_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="tp=2 x pp=2 x cp=1 x dp=1 is not a world of 2"):
        LayoutSummary(tp=2, pp=2, cp=1, dp=1, world=2)
    for nothing in (lambda: StageSummary.of([], 1), lambda: Accuracy.of([]), lambda: padding_fraction([])):
        with pytest.raises(ValueError):
            nothing()
    with pytest.raises(UserError, match=r"cannot write .*summary\.json"):
        summary().write(tmp_path / "missing")


def test_scores_count_every_question_with_and_without_images():
    assert [(s.task, s.asked, s.right, s.right_blank) for s in task_scores(EXAMPLES)] == [
        ("compare", 1, 1, 0),
        ("count", 5, 4, 1),
        ("text $\\only$", 1, 1, 1),
    ]


@pytest.mark.parametrize(
    ("verdicts", "shown"),
    [
        ([True] * 6, [0, 1, 2]),
        ([False] * 6, [0, 1, 2]),
        ([True, True, True, True, False, False], [0, 1, 4]),
        ([False, False, False, True, False, True], [0, 1, 3]),
        ([False, True, True, False], [0, 1, 2]),
        ([True], [0]),
    ],
)
def test_shown_examples_are_the_first_ones_with_both_verdicts_where_there_are_both(verdicts, shown):
    examples = [example("count", correct=verdict, question=str(index)) for index, verdict in enumerate(verdicts)]
    (group,) = choose_examples(examples)
    assert [int(one.question) for one in group.examples] == shown
    assert len(group.examples) <= SHOWN_PER_TASK


def test_the_page_is_self_contained(tmp_path):
    html, page = rendered(tmp_path)
    assert page.open == []
    assert page.tags["script"] == page.tags["link"] == 0
    assert "url(" not in html and "@import" not in html
    assert page.addresses and all(address.startswith("data:image/") for address in page.addresses)
    pictures = [base64.b64decode(address.split(",", 1)[1]) for address in page.addresses]
    kinds = Counter(address.split(";", 1)[0] for address in page.addresses)
    assert kinds == {"data:image/svg+xml": 4, "data:image/png": 3 + 2}
    sizes = [Image.open(io.BytesIO(content)).size for content in pictures if content.startswith(b"\x89PNG")]
    assert Counter(sizes) == {(60, 40): 3, (30, 30): 1, (90, 20): 1}
    for content in pictures:
        if not content.startswith(b"\x89PNG"):
            assert ElementTree.fromstring(content).tag.endswith("svg")


def test_the_page_marks_right_and_wrong_and_says_the_numbers(tmp_path):
    _, page = rendered(tmp_path)
    words = " ".join(page.text.split())
    # Shown: three of "count" (right, right, wrong), one of "compare", one text-only; one shown blanked answer is right.
    assert page.tags["article.example"] == 5
    assert page.tags["span.wrong"] == 1 and page.tags["span.right"] == 4 + 1
    assert words.count("✗ wrong") == 1 and words.count("Expected seven") == 1
    assert "text only, no image" in words
    for number in ("86 %", "29 %", "8m20s", "4.2 GB", "5,678,901", "tp=2, pp=1, cp=1, dp=1", "asked 7 questions"):
        assert number in words
    assert "Skipped broken samples 3" in words  # 12 // 4 in stage1, none in stage2


def test_what_the_model_says_cannot_break_the_page(tmp_path):
    nasty = example(
        "count",
        correct=False,
        prediction="<script>alert(1)</script>",
        question='</p>"&amp;',
        answer="<b>",
        blank_prediction="",
    )
    _, page = rendered(tmp_path, [nasty])
    assert page.tags["script"] == page.tags["b"] == 0
    assert "<script>alert(1)</script>" in page.text and '</p>"&amp;' in page.text
    assert page.tags["span.empty"] == 1  # the blank answer is said to be nothing


@pytest.mark.slow
def test_the_page_fits_a_narrow_window(tmp_path):
    long = example("count", correct=False, question="How many " + "dots" * 80 + "?", prediction="x" * 300)
    assert_fits(write_report(tmp_path, summary([*EXAMPLES, long]), METRICS, [*EXAMPLES, long]), tmp_path)


def test_a_summary_of_other_answers_or_stages_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the 6 examples give"):
        write_report(tmp_path, summary(), METRICS, EXAMPLES[:-1])
    with pytest.raises(ValueError, match="stage1"):
        write_report(tmp_path, summary(), {"stage1": METRICS["stage1"]}, EXAMPLES)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*report\.html"):
        write_report(tmp_path / "file", summary(), METRICS, EXAMPLES)


def test_running_mean_is_the_mean_of_the_neighbours_that_exist():
    values = list(np.random.default_rng(0).normal(size=17))
    for window in (1, 3, 7, 99):
        kernel = np.ones(window)
        full = np.convolve(values, kernel)[window // 2 :][:17] / np.convolve(np.ones(17), kernel)[window // 2 :][:17]
        assert charts.running_mean(values, window) == pytest.approx(list(full))


def test_charts_are_reproducible_and_survive_a_single_full_step():
    single = {"stage1": [StepRecord("stage1", 1, 1, float("nan"), 0.0, 0.0, 10, 10, 0, 1.0, 0.0, "x")]}
    for draw in (charts.loss_chart, charts.rate_chart, charts.fill_chart):
        assert draw(single) == draw(single)
        assert ElementTree.fromstring(draw(METRICS)) is not None


def test_scores_of_evaluations_while_training_have_a_chart_of_their_own():
    assert charts.score_chart(METRICS) is None
    scored = {stage: [replace(records[-1], scores={"heldout": 0.25})] for stage, records in METRICS.items()}
    chart = charts.score_chart(scored)
    assert chart is not None and chart != charts.score_chart({"stage1": scored["stage1"]})
    assert ElementTree.fromstring(chart) is not None
