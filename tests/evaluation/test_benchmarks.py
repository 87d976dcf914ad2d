"""Benchmarks from files: the same score in every form, and what is broken counts as wrong, by name."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_files import (
    in_base64,
    made_parquet,
    made_questions,
    made_shards,
    made_task,
    made_tsv,
    write_tsv,
)
from samples import image_bytes
from train_cases import answer, train

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks.entry import Entry
from megatron_eagle.evaluation.benchmarks.files import PictureFile
from megatron_eagle.evaluation.benchmarks.locate import parse_requests
from megatron_eagle.evaluation.benchmarks.scoring import score
from megatron_eagle.evaluation.benchmarks.submission import write_submission
from megatron_eagle.evaluation.benchmarks.table import benchmark_names, find_benchmark

PICTURE = image_bytes((40, 30), (200, 10, 10))
PNG = in_base64(PICTURE)


def entries_of(asked: str, folder: Path) -> list[Entry]:
    (request,) = parse_requests(asked, folder)
    with PictureFile(folder / "pictures") as pictures:
        return request.read(pictures)[0]


def right_answers(entries: list[Entry]) -> dict[str, str]:
    return {entry.id: entry.question.references[0] for entry in entries if entry.question}


def test_what_is_broken_is_named_and_wrong_and_the_total_is_all_rows(tmp_path: Path) -> None:
    row = {
        "index": "1",
        "image": PNG,
        "question": "Which?",
        "A": "a cat",
        "B": "a dog",
        "C": "",
        "D": "",
        "answer": "B",
    }
    write_tsv(tmp_path / "MMStar.tsv", [
        row,
        {**row, "index": "2", "image": PNG[:-8] + "!?" + PNG[-6:]},
        {**row, "index": "3", "image": in_base64(b"no picture at all, though in base64 " * 9)},
        {**row, "index": "1", "question": "Which again?"},
        {**row, "index": "4", "answer": "F"},
        {**row, "index": "5", "question": ""},
        {**row, "index": "6", "image": "99"},
        {**row, "index": "7", "image": "1"},
        {**row, "index": "8", "answer": ""},
        {**row, "index": "9", "image": str([PNG, ""])},
    ])  # fmt: skip
    with (tmp_path / "MMStar.tsv").open("a") as file:
        file.write("10\tcut off\n")
    entries = entries_of("mmstar", tmp_path)
    reasons = {entry.id: entry.reason for entry in entries if entry.question is None}
    assert reasons.keys() == {"2", "1 (row 4)", "4", "5", "6", "8", "9", "10"}
    assert "not in base64" in reasons["2"]
    assert reasons["1 (row 4)"] == "index 1 is that of row 1 already"
    assert reasons["4"] == "its answer 'F' is none of the options A, B"
    assert "no question in it" in reasons["5"] and "'99', which does not exist" in reasons["6"]
    assert reasons["8"] == "it has no answer to score against" and "0 bytes" in reasons["9"]
    assert reasons["10"] == "2 cells in a table of 8 columns"
    result, _ = score(find_benchmark("mmstar"), entries, right_answers(entries))
    assert (result.questions, result.asked, result.unreadable) == (11, 3, 8)
    assert result.value == pytest.approx(100 * 3 / 11)


def test_a_missing_column_is_said_for_every_row(tmp_path: Path) -> None:
    write_tsv(tmp_path / "ChartQA.tsv", [{"index": n, "image": PNG, "answer": "5"} for n in range(3)])
    entries = entries_of("chartqa", tmp_path)
    assert all("no question in it" in entry.reason for entry in entries)
    result, _ = score(find_benchmark("chartqa"), entries, {})
    assert (result.value, result.questions, result.unreadable) == (0.0, 3, 3)


def test_a_question_that_got_no_answer_is_wrong(tmp_path: Path) -> None:
    made_tsv(tmp_path / "exact.tsv", [(str(n), "What?", "yes", [PICTURE]) for n in range(4)])
    entries = entries_of("exact", tmp_path)
    result, _ = score(find_benchmark("exact"), entries, {"0": "yes", "1": " yes\n", "2": "no"})
    assert (result.value, result.asked, result.unreadable) == (50.0, 3, 1)


def test_withheld_answers_give_a_file_to_hand_in_and_no_score(tmp_path: Path) -> None:
    rows = [{"index": n, "image": PNG, "question": "Who?"} for n in (49153, 24580)]
    write_tsv(tmp_path / "DocVQA_TEST.tsv", [*rows, {**rows[0], "index": 7, "image": "!" * 99}])
    entries = entries_of("docvqa", tmp_path)
    result, scored = score(find_benchmark("docvqa"), entries, {"49153": "Bo", "24580": "ä"})
    assert (result.value, result.questions, result.unreadable, result.undecided) == (None, 3, 1, 0)
    path = write_submission(find_benchmark("docvqa"), scored, tmp_path)
    assert path is not None and json.loads(path.read_text()) == [
        {"questionId": 49153, "answer": "Bo"},
        {"questionId": 24580, "answer": "ä"},
        {"questionId": 7, "answer": ""},
    ]


def test_circular_counts_a_question_if_it_is_right_in_every_order(tmp_path: Path) -> None:
    row = {"image": PNG, "question": "Which?", "A": "cat", "B": "dog", "answer": "A"}
    turned = {**row, "image": "1", "A": "dog", "B": "cat", "answer": "B"}
    write_tsv(tmp_path / "MMBench_DEV_EN_V11.tsv", [
        {"index": 1, **row}, {"index": 2, **row}, {"index": 1_000_001, **turned}, {"index": 1_000_002, **turned},
    ])  # fmt: skip
    entries = entries_of("mmbench", tmp_path)
    result, _ = score(find_benchmark("mmbench"), entries, right_answers(entries) | {"1000002": "A"})
    assert (result.value, result.asked) == (50.0, 4)


def test_eagles_words_stand_behind_a_question(tmp_path: Path) -> None:
    options = {"index": "7", "image": PNG, "question": "Which?", "hint": "Look.", "A": "cat", "B": "dog", "answer": "A"}
    write_tsv(tmp_path / "AI2D_TEST.tsv", [options])
    write_tsv(tmp_path / "DocVQA_VAL.tsv", [{"index": 1, "image": PNG, "question": "Who?", "answer": "['Bo', 'bo']"}])
    (choice,), (free,) = entries_of("ai2d", tmp_path), entries_of("docvqa", tmp_path)
    assert choice.question and free.question
    assert choice.question.text == (
        "<image>\nHint: Look.\nWhich?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    )
    assert free.question.text == "<image>\nWho?\nAnswer the question using a single word or phrase."
    assert free.question.references == ("Bo", "bo")


def test_pictures_are_shown_where_the_text_says(tmp_path: Path) -> None:
    row = {
        "index": 1,
        "image": str([PNG, PNG]),
        "question": "<image 2> is \\<image>?",
        "A": "x",
        "B": "y",
        "answer": "A",
    }
    write_tsv(tmp_path / "MMMU.tsv", [row, {**row, "index": 2, "question": "<image 3>?"}])
    shown, beyond = entries_of("mmmu", tmp_path)
    assert shown.question and len(shown.question.pictures) == 1
    assert shown.question.text.startswith("<image> is ") and shown.stored().conversation.images == ("0.picture",)
    assert beyond.reason == "it shows <image 3> and has 2 pictures"


def test_parquet_says_options_and_answers_in_its_own_way(tmp_path: Path) -> None:
    picture = {"bytes": PICTURE, "path": None}
    rows = [
        {"question": "How many?", "options": ["1", "2", "3"], "answer": "2", "image": picture},
        {"question": "How many?", "options": ["1", "2", "3"], "answer": "5", "image": picture},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ai2d-test-00000-of-00001.parquet")
    right, beyond = entries_of("ai2d", tmp_path)
    assert right.question and right.question.references == ("C",)
    assert "'5' is none of the options A, B, C" in beyond.reason
    rows = [{"pid": "4", "query": "Hint: a letter.\nChoices:\n(A) 1\n(B) 2", "question": "q", "choices": ["1", "2"],
             "answer": "2", "answer_type": "text", "decoded_image": picture}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mathvista.parquet")
    (entry,) = entries_of("mathvista", tmp_path)
    assert entry.question and entry.question.references == ("B",) and entry.question.text.endswith("(B) 2")
    assert score(find_benchmark("mathvista"), [entry], {"4": "well, I wonder"})[0].undecided == 1


def test_files_are_found_by_name_and_never_guessed(tmp_path: Path) -> None:
    for name in ("DocVQA_VAL.tsv", "DocVQA_TEST.tsv"):
        write_tsv(tmp_path / name, [{"index": 1, "question": "q"}])
    with pytest.raises(UserError, match="several files are docvqa's"):
        parse_requests("docvqa", tmp_path)
    assert parse_requests("docvqa=DocVQA_TEST.tsv", tmp_path)[0].files == (tmp_path / "DocVQA_TEST.tsv",)
    with pytest.raises(UserError, match="no benchmark 'docqa'; there are ai2d, .*; did you mean docvqa"):
        parse_requests("docqa", tmp_path)
    with pytest.raises(UserError, match="no file for mmmu"):
        parse_requests("mmmu", tmp_path)
    with pytest.raises(UserError, match="more than once"):
        parse_requests("docvqa=DocVQA_TEST.tsv,docvqa=DocVQA_VAL.tsv", tmp_path)


def test_options_within_a_question_are_read_and_a_word_is_compared_as_one(tmp_path: Path) -> None:
    star = "Which?\nOptions: A: On it., B: Below, perhaps., C: Beside"
    real = "Where to?\nA. Left\nB. Up. Then on\nAnswer with the letter."
    rows = [(star, "B"), (real, "A"), ("How many A. b?", "Two"), (real, "C")]
    write_tsv(tmp_path / "RealWorldQA.tsv", [
        {"index": n, "image": PNG, "question": question, "answer": answer} for n, (question, answer) in enumerate(rows)
    ])  # fmt: skip
    entries = entries_of("realworldqa", tmp_path)
    found = [dict(entry.question.options) if entry.question else entry.reason for entry in entries]
    assert found[0] == {"A": "On it.", "B": "Below, perhaps.", "C": "Beside"}
    assert found[1:] == [{"A": "Left", "B": "Up. Then on"}, {}, "its answer 'C' is none of the options A, B"]
    result, _ = score(find_benchmark("realworldqa"), entries, {"0": "(B)", "1": "F", "2": " two."})
    assert (result.value, result.unreadable) == (50.0, 1)


def test_hallusionbench_counts_figures_and_questions(tmp_path: Path) -> None:
    rows = [
        {"index": f"VD_map_0_1_{figure}_{question}", "image": PNG, "question": "Is it?", "answer": "Yes",
         "l2-category": "map"}
        for figure in (0, 1) for question in (0, 1)
    ]  # fmt: skip
    write_tsv(tmp_path / "HallusionBench.tsv", [*rows, {**rows[0], "index": "VS_map_0_2_0_0", "image": ""}])
    entries = entries_of("hallusionbench", tmp_path)
    answers = {entry.id: "Yes, it is." for entry in entries} | {"VD_map_0_1_1_1": "no"}
    result, _ = score(find_benchmark("hallusionbench"), entries, answers)
    assert result.left_out == 1 and result.questions == 4
    assert result.parts == {"aAcc": 75.0, "fAcc": 50.0, "qAcc": 50.0}
    assert result.value == pytest.approx(175 / 3)
    picture = {"bytes": PICTURE, "path": None}
    table = [
        {"category": "VD", "subcategory": "map", "set_id": "1", "figure_id": str(figure), "question_id": str(question),
         "question": "Is it?", "gt_answer": "1", "image": picture}
        for figure in (0, 1) for question in (0, 1)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "hallusionbench-image-00000-of-00001.parquet")
    entries = entries_of("hallusionbench=hallusionbench-image*.parquet", tmp_path)
    answers = {entry.id: "Yes, it is." for entry in entries} | {"VD_map_1_1_1": "no"}
    assert score(find_benchmark("hallusionbench"), entries, answers)[0].parts == result.parts
    pq.write_table(pa.Table.from_pylist([*table, {**table[0], "category": "VS"}]), tmp_path / "both.parquet")
    entries = entries_of("hallusionbench=both.parquet", tmp_path)
    answers = {entry.id: "Yes." for entry in entries} | {"VS_map_1_0_0": "No."}
    found = score(find_benchmark("hallusionbench"), entries, answers)[0].parts
    assert found == pytest.approx({"aAcc": 80.0, "fAcc": 200 / 3, "qAcc": 200 / 3}), "a category has figures of its own"


def test_each_benchmark_is_a_file_with_its_name() -> None:
    names = benchmark_names()
    assert len(names) == 14 and [find_benchmark(name).name for name in names] == names
    with pytest.raises(UserError, match="no benchmark 'docvqq'.*did you mean docvqa"):
        find_benchmark("docvqq")


def ask_benchmark(recipe_path: str, runs: str, asked: str, data: str, out: str) -> None:
    from megatron_eagle.cli import main

    arguments = ["--runs", runs, "--stage", "first", "--benchmarks", asked, "--data", data, "--out", out]
    try:
        main(["evaluate", recipe_path, *arguments, "--answer-tokens", "2", "--blank"])
    except SystemExit as end:
        assert end.code == 0


def test_every_form_of_a_benchmark_and_the_shards_have_one_accuracy(small_run, worlds, tmp_path: Path) -> None:
    recipe, runs = str(small_run.write_recipe(tmp_path / "r.yaml")), str(tmp_path / "runs")
    worlds(2).run(train, recipe, "first", runs)
    heldout = small_run.folder / "heldout"
    worlds(2).run(answer, recipe, "first", runs, str(heldout), str(tmp_path / "first"), 2)
    made = made_questions(heldout, tmp_path / "first" / "predictions.jsonl")
    made_shards(tmp_path / "shards", made)
    worlds(2).run(answer, recipe, "first", runs, str(tmp_path / "shards"), str(tmp_path / "on_shards"), 2)
    accuracy = json.loads((tmp_path / "on_shards" / "accuracy.json").read_text())
    assert 0 < accuracy["overall"] < 1, "an accuracy that tells nothing"

    forms = tmp_path / "forms"
    forms.mkdir()
    files = {
        "tsv": made_tsv(forms / "made.tsv", made),
        "parquet": made_parquet(forms / "made.parquet", made),
    }
    files["task"] = made_task(forms / "made.yaml", files["parquet"])
    found: dict[str, Any] = {}
    for form, file in files.items():
        out = tmp_path / form
        worlds(2).run(ask_benchmark, recipe, runs, f"exact={file.name}", str(forms), str(out))
        found[form] = json.loads((out / "scores.json").read_text())["benchmarks"]["exact"]
        page = (out / "benchmarks.html").read_text()
        assert "data:image/jpeg;base64," in page and "http" not in page
        assert not list(out.rglob("pictures")) and not list(out.rglob("unfinished"))
    assert [result["value"] for result in found.values()] == 3 * [pytest.approx(100 * accuracy["overall"])]
    assert {(result["questions"], result["asked"]) for result in found.values()} == {(len(made), len(made))}
    blank = [json.loads(line)["blank_prediction"] for line in (out / "exact" / "predictions.jsonl").open()]
    assert len(blank) == len(made)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--limit", "3"], "--limit is for --benchmarks"),
        (["--benchmarks", "exact", "--losses"], "--losses is of a data set's samples"),
        (["--benchmarks", "exact"], "no file for exact"),
        (["--seed", "1"], "--seed is for a --temperature above 0"),
        (["--top-p", "0.5", "--temperature", "0"], "--top-p is for a --temperature above 0"),
        (["--losses", "--temperature", "1"], "--losses asks nothing"),
        (["--judge", "ftp://x", "m"], "--judge is for --benchmarks"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: list[str], words: str, tmp_path: Path, capsys: Any) -> None:
    from megatron_eagle.cli import main

    with pytest.raises(SystemExit):
        main(["evaluate", "tiny", "--data", str(tmp_path), *arguments])
    assert words in capsys.readouterr().err
