"""Made pages and charts: the same bytes again, in fonts that can write what they say, and read by the rest."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_eagle.cli import main
from megatron_eagle.curation.operator import make_operator
from megatron_eagle.curation.sample import Sample
from megatron_eagle.curation.synthesis import fonts as fonts_module
from megatron_eagle.curation.synthesis.charts import KINDS
from megatron_eagle.curation.synthesis.fonts import fonts_by_script
from megatron_eagle.curation.synthesis.noise import LEVELS, spoiled
from megatron_eagle.curation.synthesis.pages import LAYOUTS, draw_page
from megatron_eagle.curation.synthesis.words import SCRIPTS, SIGNS
from megatron_eagle.curation.synthesis.write import Synthesis, synthesise
from megatron_eagle.curation.tables import table_in, table_of
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.sample.conversation import parse_record
from megatron_eagle.errors import UserError


def files(folder: Path) -> dict[str, str]:
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    synthesise(Synthesis(3, pages=40, charts=16), folder)
    return folder


def test_a_seed_gives_the_same_bytes_and_a_longer_set_begins_with_a_shorter(made: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                "curate",
                "synthesise",
                str(tmp_path / "a"),
                "--pages",
                "9",
                "--charts",
                "4",
                "--seed",
                "3",
                "--workers",
                "2",
            ]
        )
    few, many = files(tmp_path / "a"), files(made)
    lines = records(tmp_path / "a" / "samples.jsonl")
    assert {name: digest for name, digest in many.items() if name in few and name != "samples.jsonl"} == {
        name: digest for name, digest in few.items() if name != "samples.jsonl"
    } and len(few) == 14
    assert [one for one in records(made / "samples.jsonl") if one["id"] in {line["id"] for line in lines}] == lines
    synthesise(Synthesis(4, pages=2), tmp_path / "b")
    assert not set(files(tmp_path / "b").values()) & set(many.values())


def test_all_kinds_come_and_build_takes_them(made: Path, tmp_path: Path) -> None:
    known = [one["metadata"] for one in records(made / "samples.jsonl")]
    assert {one["layout"] for one in known if "layout" in one} == set(LAYOUTS)
    assert {one["noise"] for one in known if "noise" in one} == set(LEVELS)
    assert {one["chart"] for one in known if "chart" in one} == set(KINDS)
    assert {one["script"] for one in known if "script" in one} == {"latin", "cyrillic", "greek"}
    assert len({one["font"] for one in known}) > 6
    build_dataset(made / "samples.jsonl", tmp_path / "shards")
    assert (tmp_path / "shards" / "rejected.jsonl").read_text() == ""


def test_charts_say_their_tables_and_more_may_be_asked_of_them(made: Path) -> None:
    operator = make_operator("table_questions", {"most": 2})
    charts = [one for one in records(made / "samples.jsonl") if one["task"] == "chart"]
    for one in charts:
        assert table_in(one["conversations"][1]["value"]) == table_of(one["metadata"]["table"])
    samples = [Sample("s", "chart", n, parse_record(one)) for n, one in enumerate(charts)]
    added = Counter(f.reason for _, found, _ in operator.run(samples) for f in found)  # type: ignore[attr-defined]
    assert added.total() == 4 * len(charts) and len(added) > 3


def test_no_font_writes_empty_boxes(tmp_path: Path) -> None:
    """A sign that a font lacks is drawn like any other it lacks: two different words would look alike."""
    import random

    for script, fonts in fonts_by_script(("latin", "cyrillic", "greek"), ()).items():
        assert len(fonts) >= 6 and not any("LastResort" in font.name for font in fonts), script
        for font in fonts:
            pages = [draw_page("line", script, font, random.Random(seed)).image for seed in (1, 2)]
            assert min(np.asarray(page).std() for page in pages) > 5, font
    with pytest.raises(UserError, match=r"none of \d+ fonts can write the script 'han'; give a folder"):
        synthesise(Synthesis(0, pages=1, scripts=("han",)), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no fonts"):
        synthesise(Synthesis(0, pages=1, folders=(tmp_path / "empty",)), tmp_path / "out")
    with pytest.raises(UserError, match="script klingon is not known; there are latin,"):
        Synthesis(0, pages=1, scripts=("klingon",))
    with pytest.raises(UserError, match="neither pages nor charts"):
        Synthesis(0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(UserError, match="already exists and is not empty"):
        synthesise(Synthesis(0, pages=1), tmp_path / "full")


def test_noise_changes_the_picture_and_none_does_not() -> None:
    import random

    page = Image.new("RGB", (60, 40), "white")
    assert spoiled(page, "none", random.Random(0)) is page
    strengths = [np.asarray(spoiled(page, level, random.Random(0)), dtype=float).std() for level in LEVELS]
    assert strengths[0] < strengths[1] < strengths[2]


def test_sums_of_receipts_are_right(made: Path) -> None:
    receipts = [one for one in records(made / "samples.jsonl") if one["metadata"].get("layout") == "receipt"]
    assert receipts
    for one in receipts:
        lines = one["conversations"][1]["value"].splitlines()[1:]
        cents = [round(100 * float(line.split()[-1])) for line in lines]
        assert sum(cents[:-1]) == cents[-1] and one["conversations"][3]["value"] == lines[-1].split()[-1]


def test_a_font_without_latin_letters_writes_no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of fields and goods are Latin on every page."""
    signs = {ord(sign): number for number, sign in enumerate(SCRIPTS["han"] + SIGNS)}
    monkeypatch.setattr(fonts_module, "_own_fonts", lambda: [Path("han.otf")])
    monkeypatch.setattr(fonts_module, "_glyphs", lambda file: signs)
    with pytest.raises(UserError, match="none of 1 fonts can write the script 'han'"):
        fonts_by_script(["han"], ())
    signs.update({ord(sign): 1000 + ord(sign) for sign in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"})
    assert fonts_by_script(["han"], ()) == {"han": (Path("han.otf"),)}
