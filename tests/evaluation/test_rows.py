"""Rows of benchmarks as people have them: what is asked, what is right, and what a score is a share of."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_files import in_base64, write_tsv
from samples import image_bytes

from megatron_eagle.evaluation.benchmarks.benchmark import LETTER
from megatron_eagle.evaluation.benchmarks.entry import Entry
from megatron_eagle.evaluation.benchmarks.files import PictureFile
from megatron_eagle.evaluation.benchmarks.locate import parse_requests
from megatron_eagle.evaluation.benchmarks.prepare import limited
from megatron_eagle.evaluation.benchmarks.scoring import score
from megatron_eagle.evaluation.benchmarks.submission import write_submission
from megatron_eagle.evaluation.benchmarks.table import find_benchmark

PICTURE = image_bytes((40, 30), (200, 10, 10))
PNG = in_base64(PICTURE)


def entries_of(name: str, folder: Path, rows: list[dict[str, Any]], form: str) -> list[Entry]:
    """The entries of a file of ``rows``, each with a picture."""
    file = folder / f"{name}.{form}"
    if form == "tsv":
        write_tsv(file, [{**row, "image": PNG} for row in rows])
    else:
        pq.write_table(pa.Table.from_pylist([{**row, "image": {"bytes": PICTURE, "path": None}} for row in rows]), file)
    (request,) = parse_requests(f"{name}={file.name}", folder)
    with PictureFile(folder / "pictures") as pictures:
        return request.read(pictures)[0]


@pytest.mark.parametrize("form", ["tsv", "parquet"])
def test_a_list_of_mathvista_is_one_answer(form: str, tmp_path: Path) -> None:
    row = {"pid": "1", "query": "Which two?", "answer": "[1, 2]", "answer_type": "list"}
    (entry,) = entries_of("mathvista", tmp_path, [row], form)
    assert entry.question and entry.question.references == ("[1, 2]",)
    for answer, value, undecided in (("[1, 2]", 100.0, 0), ("1", 0.0, 1)):
        result, _ = score(find_benchmark("mathvista"), [entry], {"1": answer})
        assert (result.value, result.undecided) == (value, undecided), answer


@pytest.mark.parametrize("form", ["tsv", "parquet"])
def test_nan_is_no_hint_and_no_option_of_mmbench(form: str, tmp_path: Path) -> None:
    row = {"index": "1", "hint": "nan", "question": "q", "A": "x", "B": "y", "C": "nan", "D": "NaN", "answer": "B"}
    alone = {**row, "index": "2", "hint": "Look.", "A": "nan", "B": "nan", "answer": "A"}
    real = {**row, "index": "3", "answer": "C"}
    first, second, third = entries_of("mmbench", tmp_path, [row, alone, real], form)
    assert first.question and first.question.text == f"<image>\nq\nA. x\nB. y{LETTER}"
    assert dict(first.question.options) == {"A": "x", "B": "y"}
    assert second.question and second.question.text.startswith("<image>\nHint: Look.\nq\nA. nan\nB. nan")
    assert third.reason == "its answer 'C' is none of the options A, B"
    (other,) = entries_of("ai2d", tmp_path, [row], form)
    assert other.question and "C. nan" in other.question.text, "words of other benchmarks stay"


def test_a_score_of_mmmu_is_of_validation_where_the_file_says_so(tmp_path: Path) -> None:
    row = {"question": "Which?", "A": "x", "B": "y", "answer": "A", "category": "Art"}
    rows = [{**row, "index": f"{split}_{n}", "split": split} for split in ("dev", "validation") for n in range(2)]
    entries = entries_of("mmmu", tmp_path, rows, "tsv")
    answers = {"dev_0": "A", "dev_1": "A", "validation_0": "A", "validation_1": "B"}
    result, scored = score(find_benchmark("mmmu"), entries, answers)
    assert (result.value, result.questions, result.left_out) == (50.0, 2, 2)
    assert [one.entry.id for one in scored] == ["validation_0", "validation_1"]
    kept, notes = limited(entries, (), 1)
    assert [entry.id for entry in kept] == ["validation_0"] and notes == ("the first 1 of 2 questions",)
    assert limited(entries, (), 2) == (entries, ())
    entries = entries_of("mmmu", tmp_path, rows[:2], "tsv")
    assert score(find_benchmark("mmmu"), entries, answers)[0].questions == 2, "a file of one split counts whole"


def test_a_question_mark_for_an_answer_of_mmmu_is_withheld(tmp_path: Path) -> None:
    rows = [
        {"id": "test_1", "question": "Which?", "options": "['x', 'y']", "answer": "?"},
        {"id": "test_2", "question": "How many?", "options": "[]", "answer": "?"},
    ]
    entries = entries_of("mmmu", tmp_path, rows, "parquet")
    assert [entry.reason for entry in entries] == ["", ""]
    result, _ = score(find_benchmark("mmmu"), entries, {"test_1": "A", "test_2": "3"})
    assert (result.value, result.asked) == (None, 2)


def test_options_within_a_question_are_asked_with_eagles_words(tmp_path: Path) -> None:
    star = "Which?\nOptions: A: On it, B: Below, C: Answer by letter, D: None"
    real = (
        "Where to?\nA. Left\nB. Up\nPlease answer directly with only the letter of the correct option and nothing else."
    )
    rows = [{"index": n, "question": text, "answer": "A"} for n, text in enumerate((star, real))]
    first, second = entries_of("mmstar", tmp_path, rows, "parquet")
    assert first.question and first.question.text == f"<image>\n{star}{LETTER}"
    assert second.question and second.question.text == f"<image>\n{real}"
    word = {"index": 0, "question": "How many? Please answer directly with a single word or number.", "answer": "2"}
    (free,) = entries_of("realworldqa", tmp_path, [word], "parquet")
    assert free.question and free.question.text == f"<image>\n{word['question']}"


def test_a_submission_has_the_servers_numbers_of_questions(tmp_path: Path) -> None:
    rows = [{"index": n, "questionId": number, "question": "Who?"} for n, number in enumerate((49153, 24580))]
    entries = entries_of("docvqa", tmp_path, rows, "tsv")
    _, scored = score(find_benchmark("docvqa"), entries, {"0": "Bo"})
    path = write_submission(find_benchmark("docvqa"), scored, tmp_path)
    assert path and json.loads(path.read_text()) == [
        {"questionId": 49153, "answer": "Bo"},
        {"questionId": 24580, "answer": ""},
    ]
