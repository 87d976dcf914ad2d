"""What only a judge can tell: asked of an endpoint once, kept, and never drawn where it says nothing usable."""

import json
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import KEY, Act, asked_text, endpoint_server

from megatron_eagle.endpoint.queue import Queue
from megatron_eagle.endpoint.settings import Endpoint
from megatron_eagle.evaluation.benchmarks.entry import Entry, Question
from megatron_eagle.evaluation.benchmarks.judge import judged
from megatron_eagle.evaluation.benchmarks.scoring import result_of, score
from megatron_eagle.evaluation.benchmarks.table import find_benchmark

pytest.importorskip("openai", reason="the extra [endpoint] is not installed")


def entry(identity: str, reference: str, **fields: str) -> Entry:
    return Entry(identity, "", fields, Question("<image>\nWhat?", (), (reference,), {}))


def judge(act: Any, name: str, entries: list[Entry], answers: dict[str, str], folder: Path) -> tuple[Any, Any, int]:
    """(result by rule, result with the judge, requests that reached the endpoint)"""
    with endpoint_server(act) as server:
        where = Endpoint(server.url, "grader", attempts=1)
        before, scored = score(find_benchmark(name), entries, answers)
        with Queue(where, folder, KEY) as queue:
            after = result_of(find_benchmark(name), judged(find_benchmark(name), scored, queue), 0)
        return before, after, server.asked.total()


def test_grades_are_kept_and_what_is_no_grade_stays_undecided(tmp_path: Path) -> None:
    def act(body: dict[str, Any], times: int) -> Act:
        words = asked_text(body)
        assert "Reference: " in words and "<image>" not in words
        said = {"good": '{"grade": 0.6}', "odd": '{"grade": 7}', "chatty": "Well done, 1.0!", "flag": '{"grade": true}'}
        return Act(next(text for answer, text in said.items() if f"Answer: {answer}" in words))

    answers = {"1": "good", "2": "odd", "3": "chatty", "4": "flag"}
    entries = [entry(identity, "a <AND> b") for identity in answers]
    before, after, asked = judge(act, "mmvet", entries, answers, tmp_path)
    assert (before.value, before.undecided) == (0.0, 4)
    assert (after.value, after.undecided, asked) == (pytest.approx(15.0), 3, 4)
    _, again, asked = judge(act, "mmvet", entries, answers, tmp_path)
    assert (again, asked) == (after, 0), "answers on disk are asked for again"


def test_a_value_in_words_is_found_by_the_judge_and_compared_by_the_rule(tmp_path: Path) -> None:
    def act(body: dict[str, Any], times: int) -> Act:
        assert "Reference" not in asked_text(body), "the judge that finds a value is told the right one"
        value = "7" if "seven" in asked_text(body) else ""
        return Act(json.dumps({"value": value}))

    answers = {"1": "It is seven.", "2": "Who knows?", "3": "7", "4": "8"}
    entries = [entry(identity, "7", answer_type="integer") for identity in answers]
    before, after, asked = judge(act, "mathvista", entries, answers, tmp_path)
    assert (before.value, before.undecided, asked) == (25.0, 2, 2)
    assert (after.value, after.undecided) == (50.0, 0)
