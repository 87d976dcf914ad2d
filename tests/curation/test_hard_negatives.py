"""What is hard for a model stays: by predictions, and by losses."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from samples import question

from megatron_eagle.curation.operator import Verdict, make_operator
from megatron_eagle.curation.sample import Sample
from megatron_eagle.data.sample.conversation import parse_record
from megatron_eagle.errors import UserError


def lines(file: Path, entries: Iterable[Any]) -> str:
    file.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return str(file)


def samples(many: int) -> list[Sample]:
    return [Sample("a", "general", n, parse_record(question(f"s{n}", "What?", "That."))) for n in range(many)]


def left(many: int, **settings: Any) -> set[int]:
    operator: Any = make_operator("hard_negatives", settings)
    operator.prepare(Path("unused"))
    found: list[Verdict] = operator.run(samples(many))
    return {one.key[1] for one in found if one.finding.decision == "left" and one.key[1] is not None}


def test_wrong_answers_stay_and_conversations_count_all_theirs(tmp_path: Path) -> None:
    entries = [{"id": f"s{n}", "answer": "yes", "prediction": " yes" if n % 2 else "no"} for n in range(6)]
    entries += [{"id": f"s6#{n}", "answer": "1", "prediction": "1" if n < 4 else "2"} for n in range(1, 5)]
    file = lines(tmp_path / "predictions.jsonl", entries)
    assert left(8, file=file) == {1, 3, 5, 6}, "of 6 a quarter is wrong; 7 is not known and stays"
    assert left(8, file=file, unknown=False) == {1, 3, 5, 6, 7}
    assert left(8, file=file, least=0.25) == {1, 3, 5}


def test_losses_select_weigh_and_leave_what_is_too_hard(tmp_path: Path) -> None:
    entries = [{"id": f"s{n}", "loss": n / 10, "tokens": 5, "length": 30} for n in range(100)]
    file = lines(tmp_path / "losses.jsonl", entries)
    assert left(100, file=file, least=2.5) == set(range(25))
    assert left(100, file=file, how="select", share=0.1) == set(range(90))
    assert left(100, file=file, how="select", share=0.1, most=8.9) == {*range(81), *range(90, 100)}
    drawn = [set(range(100)) - left(100, file=file, how="weigh", share=0.2, seed=seed) for seed in range(40)]
    assert drawn[0] != drawn[1] and all(len(one) == 20 and 0 not in one for one in drawn)
    assert drawn[3] == set(range(100)) - left(100, file=file, how="weigh", share=0.2, seed=3)
    times = [sum(n in one for one in drawn) for n in range(100)]
    assert sum(times[50:]) > 1.8 * sum(times[:50]), "in proportion to the loss"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "reads what 'megatron-eagle evaluate' writes; "),
        ("", "is empty"),
        ('{"id": "a", "loss": 1}\n{"id": "b"}\n', "line 2 is neither a prediction nor a loss"),
        ('{"id": "a", "loss": NaN}\n', "line 1 has the id 'a' and is nan hard"),
        ("[1]\n", "line 1 is neither"),
    ],
)
def test_another_file_is_one_line(content: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "losses.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError) as error:
        left(1, file=str(file))
    assert (
        words in str(error.value) and "\n" not in str(error.value) and "operator 'hard_negatives'" in str(error.value)
    )


def of_sources(ids: dict[str, list[str]], **settings: Any) -> dict[tuple[str, int | None], float | None]:
    """How hard each sample is said to be."""
    operator: Any = make_operator("hard_negatives", settings)
    found = operator.run(
        Sample(name, "general", n, parse_record(question(identity, "What?", "That.")))
        for name, own in ids.items() for n, identity in enumerate(own)
    )  # fmt: skip
    return {one.key: one.finding.scores.get("hard") for one in found}


def test_sources_with_the_same_ids_are_told_apart(tmp_path: Path) -> None:
    right, wrong = ({"id": "7", "answer": "1", "prediction": said} for said in "12")
    files = {"a": lines(tmp_path / "a.jsonl", [right]), "b": lines(tmp_path / "b.jsonl", [wrong])}
    ids = {"a": ["7"], "b": ["7"], "c": ["7"]}
    assert of_sources(ids, file=files) == {("a", 0): 0, ("b", 0): 1, ("c", 0): None}
    with pytest.raises(UserError, match="the sources 'a' and 'b' both have a sample '7'"):
        of_sources(ids, file=lines(tmp_path / "both.jsonl", [right, wrong]))
    operator: Any = make_operator("hard_negatives", {"file": {"d": "x"}})
    with pytest.raises(ValueError, match=r"file is of the sources \['d'\]; there are \['a'\]"):
        operator.check({"a": "general"}, [])


def test_an_id_that_ends_like_a_number_of_a_question_is_whole_if_there_is_such_a_sample(tmp_path: Path) -> None:
    entries = [{"id": f"page#{n}", "answer": "1", "prediction": str(n)} for n in (1, 2)]
    file = lines(tmp_path / "predictions.jsonl", entries)
    assert of_sources({"a": ["page", "page#2"]}, file=file) == {("a", 0): 0, ("a", 1): 1}
    assert of_sources({"a": ["page"]}, file=file) == {("a", 0): 0.5}
