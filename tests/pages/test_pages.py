"""Pages: what the shared template and its histograms promise, and the page of ``data inspect`` in a browser."""

import numpy as np
import pytest
import torch
from browser import ask_page, assert_fits

from megatron_eagle.data.reports.inspection import SourceView
from megatron_eagle.data.reports.shown_sample import Block, Picture, Piece, ShownSample, _sheet
from megatron_eagle.errors import UserError
from megatron_eagle.pages import render, write
from megatron_eagle.pages.charts import histogram


def test_few_whole_numbers_have_a_bar_each():
    found = histogram("tiles", {"a": [1, 1, 3], "b": [4], "nothing": []})
    assert [strip.name for strip in found.strips] == ["a", "b"]
    assert [(bar.range, bar.count) for bar in found.strips[0].bars] == [("1", 2), ("2", 0), ("3", 1), ("4", 0)]
    assert found.strips[0].summary == "3, median 1" and found.ticks == ("1", "2.5", "4") and not found.logarithmic
    assert max(bar.height for bar in found.strips[1].bars) == 1.0


@pytest.mark.parametrize("values", [[5], [0.5, 0.5], range(1, 10_000), np.geomspace(0.11, 11.8, 77), [-3, 900]])
def test_no_value_is_lost(values):
    (strip,) = histogram("x", {"a": values}).strips
    assert sum(bar.count for bar in strip.bars) == len(values)


def test_wide_spans_are_logarithmic_and_nothing_is_no_panel():
    assert histogram("x", {"a": [1, 50.0]}).logarithmic and not histogram("x", {"a": [0, 50.0]}).logarithmic
    assert histogram("x", {"a": [], "b": []}) is None
    assert histogram("x", {"a": range(1, 10_000)}).strips[0].bars[-1].range.endswith("to 9,999")


def test_tiles_stand_in_their_grid_with_the_thumbnail_beside(monkeypatch):
    pasted = []
    monkeypatch.setattr("PIL.Image.Image.paste", lambda sheet, tile, place: pasted.append((sheet.size, place)))
    _sheet(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), 1, 3)
    assert {size for size, _ in pasted} == {(236, 344)}
    assert [place for _, place in pasted] == [(0, 0), (0, 116), (0, 232), (124, 0)]


def test_a_disk_that_refuses_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/page.html: "):
        write("page", tmp_path / "file" / "page.html")


@pytest.fixture
def page(tmp_path):
    """The page of two data sets with long names and three samples, one of them with hostile texts."""
    numbers = np.array([5, 80, 4000])
    name = "data/" + "a-long-name-without-spaces" * 3
    views = [SourceView(own, 3, [], numbers, numbers, numbers, numbers / 80, {}) for own in (name, "data/b")]
    shot = _sheet(torch.zeros(13, 3, 8, 8, dtype=torch.uint8), 12, 1)
    pictures = (Picture("image 1", "12 x 1 and a thumbnail", 13, shot), Picture("video 1 at 0.0 s", "1 x 1", 1, ""))
    question = Block(False, (Piece("What is <b>it</b>? " + "x" * 400), Piece("", pictures[0])))
    samples = [
        ShownSample("one", name, "images", 90, 3, (question, Block(True, (Piece("a Zebra"),))), pictures),
        ShownSample("two", "data/b", "text", 9, 3, (Block(True, (Piece("</script><script>alert(1)</script>"),)),), ()),
        ShownSample("three" * 40, "data/b", "images", 9, 3, (), ()),
    ]
    text = render(
        "megatron_eagle.data.reports:inspection.html.j2",
        summary="packs",
        heads=("source", "samples = used + rejected", "tokens", "5 / 50 / 95 %", "images", "tiles each", "frames"),
        views=views,
        charts=[histogram("tokens", {name: numbers, "data/b": numbers})],
        degraded=[f"{name}: 3 whole"],
        rejected=[f"sample {number}: {'broken' * 20}" for number in range(60)],
        samples=samples,
    )
    write(text, tmp_path / "page.html")
    return tmp_path / "page.html"


def test_texts_of_samples_are_texts(page):
    text = page.read_text()
    assert "What is &lt;b&gt;it&lt;/b&gt;?" in text and "<script>alert" not in text
    assert text.count("<figure") == 1 and ">and 1 more</p>" in text and "and 10 more" in text


@pytest.mark.slow
def test_the_page_fits_a_narrow_window(page, tmp_path):
    assert_fits(page, tmp_path)


@pytest.mark.slow
def test_samples_are_found_by_words_data_set_and_kind(page, tmp_path):
    script = """
      const found = [];
      for (const [field, value] of [["words", "zebra ONE"], ["words", ""], ["source", "data/b"], ["kind", "text"]]) {
        document.getElementById(field).value = value;
        document.getElementById(field).dispatchEvent(new Event("input"));
        found.push([...document.querySelectorAll("article")].map(one => one.getClientRects().length > 0));
      }
      return [found, document.getElementById("count").textContent];
    """
    found, said = ask_page(page, script, tmp_path)
    assert found == [[True, False, False], [True] * 3, [False, True, True], [False, True, False]]
    assert said == "1 of 3 shown"
