"""Operators that add and change turns: by rule from what a record knows, and by a model behind a real HTTP endpoint."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from endpoint_server import KEY, Act, Server, asked_text, endpoint_server
from samples import image_bytes, question, write_jsonl

from megatron_eagle.cli import main
from megatron_eagle.curation.asking import Ask, Draft, give_key
from megatron_eagle.curation.engine import curate
from megatron_eagle.curation.ledger import explain
from megatron_eagle.curation.operator import make_operator
from megatron_eagle.curation.operators.reasoning import same_answer
from megatron_eagle.curation.plan import load_plan
from megatron_eagle.curation.sample import Finding, Sample, apply_findings
from megatron_eagle.curation.tables import Table, table_in, table_of
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.sample.conversation import parse_record
from megatron_eagle.endpoint.question import Reply
from megatron_eagle.errors import UserError

TABLE = {
    "columns": ["city", "people", "area"],
    "rows": [["Oslo", "700", "4.5"], ["Rome", "2,800", "12.25"], ["Bern", "130", "5"]],
}
MARKDOWN = "| city | people |\n|---|---|\n| Oslo | 700 |\n| Rome | 2,800 |\n| Bern | 130 |"

PROCESS = """
import sys
from pathlib import Path
from megatron_eagle.curation.engine import curate
from megatron_eagle.curation.plan import load_plan
folder = Path(sys.argv[1])
if not (folder / "out").exists():
    curate(load_plan(folder / "plan.yaml"), folder / "out")
"""


def sample(folder: Path, record: dict[str, Any], size: tuple[int, int] = (200, 100)) -> Sample:
    folder.mkdir(exist_ok=True)
    file = folder / "a.png"
    file.write_bytes(image_bytes(size, "red"))
    conversation = parse_record(record)
    places = (FileSlice(file, 0, file.stat().st_size),) * len(conversation.images)
    return Sample("source", "general", 0, conversation, places)


def texts(one: Sample | None) -> list[tuple[str, str]]:
    assert one is not None
    return [(turn.role, turn.text) for turn in one.conversation.turns]


def after(name: str, settings: dict[str, Any], one: Sample) -> tuple[list[Finding], Sample | None]:
    operator: Any = make_operator(name, settings)
    ((_, found, changed),) = operator.run([one])
    return found, changed


def test_questions_of_a_table_are_exact(tmp_path: Path) -> None:
    for record in (
        question("a", "Read the chart as a table.", MARKDOWN, "a.png"),
        question("b", "What is it?", "A chart.", "a.png", metadata={"table": TABLE}),
    ):
        found, changed = after("table_questions", {"most": 40}, sample(tmp_path, record))
        turns = texts(changed)
        assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2) and len(turns) > 12
        answers = dict(zip([text for _, text in turns[2::2]], [text for _, text in turns[3::2]], strict=True))
        assert len(answers) == len(turns) // 2 - 1, "no question is asked twice"
        assert answers["Which city has the largest people?"] == "Rome"
        assert answers["Which city has the smallest people?"] == "Bern"
        assert answers["By how much is the people of Rome larger than that of Oslo?"] == "2100"
        assert answers["What is the sum of people over all rows?"] == "3630"
        assert answers["How many rows have a people above 130?"] == "2"
        assert answers["What is the people of Rome?"] == "2,800"
        assert {one.decision for one in found} == {"added"} and len(found) == len(turns) - 2
    assert answers["What is the sum of area over all rows?"] == "21.75", "decimal, no more digits than the table has"
    assert found == after("table_questions", {"most": 40}, sample(tmp_path, record))[0], "seeded"
    few = after("table_questions", {"most": 2, "kinds": ["lookup"], "seed": 1}, sample(tmp_path, record))[0]
    assert len(few) == 4 and few[0].reason == "asked of a table: lookup"


def test_what_is_no_table_is_not_asked_about(tmp_path: Path) -> None:
    for table in (
        {"columns": ["a"], "rows": [["1"]]},
        {"columns": ["a", "b"], "rows": [["x", "1"], ["x", "2"]]},
        3,
        None,
    ):
        assert table_of(table) is None
        record = question("a", "What?", "That | this", "a.png", metadata={"table": table})
        assert after("table_questions", {}, sample(tmp_path, record))[0] == []
    ties = Table(("name", "n"), (("a", "1"), ("b", "1"), ("c", "1")))
    assert ties.numbers(1) == [Decimal(1)] * 3 and table_in(ties.markdown()) == ties
    record = question("a", "Table?", ties.markdown(), "a.png")
    assert after("table_questions", {"kinds": ["largest", "smallest", "difference"]}, sample(tmp_path, record))[0] == []


def test_questions_of_boxes(tmp_path: Path) -> None:
    boxes = [
        {"label": "dog", "box": [0, 0, 50, 50]}, {"label": "cat", "box": [60, 60, 200, 100]},
        {"label": "bird", "box": [10, 0, 20, 10]}, {"label": "bird", "box": [30, 0, 40, 10]},
    ]  # fmt: skip
    one = sample(tmp_path, question("a", "What?", "Animals.", "a.png", metadata={"boxes": boxes}))
    turns = [text for _, text in texts(after("box_questions", {"most": 99, "complete": True}, one)[1])]
    answers = dict(zip(turns[2::2], turns[3::2], strict=True))
    assert answers["Where is the cat? Answer with its box."] == "[300, 600, 1000, 1000]"
    assert answers["Is the cat to the left or to the right of the dog? Answer left or right."] == "right"
    assert answers["Is the dog above or below the cat? Answer above or below."] == "above"
    assert answers["How many objects of the kind 'bird' are in the image?"] == "2"
    assert not any("the bird" in asked for asked in answers), "there are two of them"
    assert not any("kind" in text for _, text in texts(after("box_questions", {"most": 99}, one)[1]))
    wrong = sample(
        tmp_path, question("a", "What?", "It.", "a.png", metadata={"boxes": [{"label": "x", "box": [0, 0, 201, 5]}]})
    )
    found, changed = after("box_questions", {}, wrong)
    assert [(f.decision, f.reason) for f in found] == [("noted", "boxes that cannot be used")]
    assert "200x100" in found[0].detail and len(texts(changed)) == 2


def test_questions_of_metadata(tmp_path: Path) -> None:
    record = question("a", "What?", "A view.", "a.png", metadata={"artist": "<image> Ltd", "year": 1889, "old": True})
    asked = {"artist": "Who painted this?", "year": "When?", "old": "Old?", "place": "Where?"}
    turns = texts(after("metadata_questions", {"questions": asked}, sample(tmp_path, record))[1])
    assert turns[2:] == [
        ("user", "Who painted this?"),
        ("assistant", r"\<image> Ltd"),
        ("user", "When?"),
        ("assistant", "1889"),
    ]
    with pytest.raises(ValueError, match="has no question"):
        make_operator("metadata_questions", {"questions": {}})


def test_turns_are_added_behind_the_last_and_nowhere_else(tmp_path: Path) -> None:
    one = sample(tmp_path, question("a", "What?", "That.", "a.png"))
    new = [Finding("added", "r", turn=3, text="And?"), Finding("added", "r", turn=4, text="This.")]
    assert texts(apply_findings(one, new, "op", "exchange"))[2:] == [("user", "And?"), ("assistant", "This.")]
    gone = [Finding("rejected", "wrong", turn=2), *new]
    assert [text for _, text in texts(apply_findings(one, gone, "op", "exchange"))] == ["<image>\nAnd?", "This."]
    with pytest.raises(ValueError, match="operator 'op' adds turn 4 to 2 turns"):
        apply_findings(one, new[1:], "op", "exchange")
    with pytest.raises(ValueError, match="a finding that is added has turn=None"):
        Finding("added", "r", text="x")


# --- a model behind an endpoint ---


RECORDS = 12


def model(body: dict[str, Any], before: int) -> Act:
    """A model that is right about even samples, in any operator's form; the judge is another one, told by its name."""
    asked = asked_text(body)
    if before == 0 and "number 3" in asked:
        return Act(status=500)
    if body["model"] == "judge":
        return Act(json.dumps({"good": "number 4 " not in asked, "why": "so it is"}))
    number = int(asked.partition("number ")[2].split()[0])
    if "natural sentence" in asked:
        return Act(
            json.dumps({"sentence": f"There are {number} dots in it." if number % 2 == 0 else "There are some."})
        )
    if "step by step" in asked:
        steps = "I see the dots in rows, count each row, and add all of them."
        return Act(json.dumps({"steps": steps, "answer": str(number if number % 2 == 0 else 99)}))
    if "Is the answer right" in asked:
        return Act(json.dumps({"right": number % 2 == 0, "why": "counted"}) if number != 7 else "Perhaps.")
    raise AssertionError(asked)


def curated(
    folder: Path, server: Server, operators: list[dict[str, Any]], out: str, key: str | None = KEY, **where: Any
) -> Path:
    """A plan of these operators over RECORDS records, run from the command line."""
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(image_bytes((80, 60), "red"))
    records = [question(f"s{n}", f"How many dots has number {n} here?", str(n), "a.png") for n in range(RECORDS)]
    write_jsonl(folder, records)
    for name in ("model", "judge"):
        limits = {"url": server.url, "model": name, "first_wait": 0.01, **where}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(limits))
    asking = {"endpoint": str(folder / "model.yaml"), "answers": str(folder / "answers")}
    plan = {
        "name": "ask", "block": 5, "sources": [{"name": "dots", "path": str(folder / "samples.jsonl")}],
        "operators": [{**asking, **one} for one in operators],
    }  # fmt: skip
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    if key is not None:
        (folder / "key").write_text(key)
        for name in ("model", "judge"):
            file = folder / f"{name}.yaml"
            file.write_text(file.read_text() + f"key_file: {folder / 'key'}\n")
    curate(load_plan(folder / "plan.yaml"), folder / out)
    return folder / out


def kept(out: Path) -> dict[str, list[str]]:
    lines = (out / "kept" / "dots" / "samples.jsonl").read_text().splitlines()
    return {one["id"]: [turn["value"] for turn in one["conversations"]] for one in map(json.loads, lines)}


def reasons(out: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((out / "summary.json").read_text())["sources"][0]["reasons"]
    return found


def test_short_answers_are_expanded_and_the_judge_has_its_say(tmp_path: Path) -> None:
    use = {"use": "expand_answers", "judge": str(tmp_path / "judge.yaml")}
    with endpoint_server(model) as server:
        out = curated(tmp_path, server, [use], "out")
        asked = dict(server.asked)
        again = curated(tmp_path, server, [use], "again")
    assert dict(server.asked) == asked, "nothing is asked twice"
    for name in ("ledger.parquet", "summary.json", "kept/dots/samples.jsonl", "report.html"):
        assert (out / name).read_bytes() == (again / name).read_bytes()
    expanded = {f"s{n}": f"There are {n} dots in it." if n % 2 == 0 and n != 4 else str(n) for n in range(RECORDS)}
    assert {name: turns[1] for name, turns in kept(out).items()} == expanded
    assert reasons(out) == {
        "expand_answers: refused by the judge (noted)": 1,
        "expand_answers: short answer expanded (changed)": 5,
        "expand_answers: the sentence does not hold the answer (noted)": 6,
    }
    rows = pq.read_table(out / "ledger.parquet").to_pylist()
    assert [(row["before"], row["after"], row["detail"]) for row in rows if row["sample"] == "s2" and row["after"]] == [
        ("2", "There are 2 dots in it.", "model")
    ]
    images = [part for body in map(json.loads, server.asked) for part in body["messages"][0]["content"]]
    assert sum(part["type"] == "image_url" for part in images) == len(server.asked)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_kills_while_a_model_is_asked_change_no_byte(tmp_path: Path) -> None:
    """One question is never answered, and so asked anew at each start; of the others at most those in flight are."""

    def act(body: dict[str, Any], before: int) -> Act:
        return Act(status=500) if "number 5 " in asked_text(body) else replace(model(body, 1), wait=0.05)

    use = [{"use": "expand_answers", "judge": str(tmp_path / "judge.yaml")}, {"use": "reasoning", "tasks": ["number"]}]
    rng, kills = random.Random(3), 0
    with endpoint_server(act) as server:
        whole = curated(tmp_path, server, use, "whole", attempts=2, at_once=3)
        shutil.rmtree(tmp_path / "answers")
        server.answered.clear()
        for start in range(12):
            process = subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path)], start_new_session=True)
            until = sum(server.answered.values()) + rng.randint(0, 6)
            while process.poll() is None and (start == 11 or sum(server.answered.values()) < until):
                time.sleep(0.005)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
            process.wait()
    assert kills > 3 and sum(server.answered.values()) - len(server.answered) <= 2 * 3 * kills
    for name in ("ledger.parquet", "summary.json", "kept/dots/samples.jsonl", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes(), name


def test_steps_are_kept_where_they_come_to_the_answer_and_wrong_answers_go(tmp_path: Path) -> None:
    use = [{"use": "verify"}, {"use": "reasoning", "tasks": ["number"]}]
    with endpoint_server(model) as server:
        out = curated(tmp_path, server, use, "out")
    turns = kept(out)
    assert sorted(turns) == ["s0", "s10", "s2", "s4", "s6", "s7", "s8"], "of the odd ones 7 got no verdict"
    assert turns["s7"][1] == "7" and turns["s8"][1].endswith("add all of them.\n\nAnswer: 8")
    assert turns["s8"][0].endswith("here?\nThink step by step, then give the answer.")
    found = reasons(out)
    assert found["verify: a model finds it wrong (rejected)"] == 5
    assert found["verify: no use of the answer: not the JSON asked for (noted)"] == 1
    assert found["reasoning: chain of thought put before the answer (changed)"] == 12, "questions and answers"
    assert found["reasoning: the model comes to another answer (noted)"] == 1


def test_a_rejection_needs_the_judges_agreement(tmp_path: Path) -> None:
    """The judge finds everything right but the answer to number 4, which the model does not doubt."""
    with endpoint_server(model) as server:
        out = curated(tmp_path, server, [{"use": "verify", "judge": str(tmp_path / "judge.yaml")}], "out")
    assert len(kept(out)) == RECORDS and reasons(out)["verify: refused by the judge (noted)"] == 5


def test_descriptions_are_added_as_an_exchange(tmp_path: Path) -> None:
    words = "A red picture with nothing on it. " * 4
    with endpoint_server(lambda body, before: Act(words)) as server:
        out = curated(tmp_path, server, [{"use": "describe", "share": 0.5}], "out")
    longer = {name: turns for name, turns in kept(out).items() if len(turns) == 4}
    assert 2 <= len(longer) <= 10 and all(turns[3] == words.strip() for turns in longer.values())
    name = next(iter(longer))
    rows = [row for row in pq.read_table(out / "ledger.parquet").to_pylist() if row["sample"] == name and row["after"]]
    assert [(row["turn"], row["decision"], row["before"], row["after"]) for row in rows] == [
        (3, "added", None, longer[name][2]), (4, "added", None, words.strip())
    ]  # fmt: skip
    assert any("turn 4: added by describe: description added" in line for line in explain(out, name))
    assert "added: A red picture" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("key", "where", "words"),
    [
        ("wrong", {}, "refuses the key (401): Incorrect API key provided"),
        (KEY, {"url": "http://127.0.0.1:9/v1"}, "no endpoint at http://127.0.0.1:9/v1: "),
        (KEY, {"cost": 3}, "model.yaml: cost: no such key"),
    ],
    ids=["key", "nobody", "setting"],
)
def test_an_endpoint_that_cannot_be_asked_is_one_line(
    key: str, where: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint_server(model) as server, pytest.raises(UserError) as error:
        curated(tmp_path, server, [{"use": "verify"}], "out", key, **where)
    assert words in str(error.value) and "\n" not in str(error.value) and not server.asked
    assert not (tmp_path / "out").exists()


def test_the_key_comes_from_a_variable_that_the_command_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint_server(model) as server:
        with pytest.raises(UserError, match="401"):
            curated(tmp_path, server, [{"use": "verify"}], "out", None)
        command = ["curate", str(tmp_path / "plan.yaml"), str(tmp_path / "out"), "--key-variable", "SOME_KEY"]
        with pytest.raises(SystemExit):
            main(command)
        assert "--key-variable SOME_KEY: the environment has no such variable" in capsys.readouterr().err
        monkeypatch.setenv("SOME_KEY", KEY)
        plan = load_plan(tmp_path / "plan.yaml")
        give_key(plan.steps, KEY)
        assert KEY.encode() not in pickle.dumps(plan), "workers do not ask"
        with pytest.raises(SystemExit, match="0"):
            main(command)
    assert len(kept(tmp_path / "out")) == 7
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_a_run_that_stopped_at_its_limit_goes_on_with_a_higher_one(tmp_path: Path) -> None:
    prices = {"cost_in": 1000.0, "cost_out": 1000.0, "at_once": 1}
    with endpoint_server(model) as server:
        with pytest.raises(UserError, match="most_cost is 1.85"):
            curated(tmp_path, server, [{"use": "verify"}], "out", most_cost=1.85, **prices)
        assert 0 < len(server.answered) < RECORDS
        limited = (tmp_path / "model.yaml").read_text()
        (tmp_path / "model.yaml").write_text(limited.replace("most_cost: 1.85", "most_cost: 50.0"))
        curate(load_plan(tmp_path / "plan.yaml"), tmp_path / "out")
    assert set(server.answered.values()) == {1} and len(server.answered) == RECORDS
    assert len(kept(tmp_path / "out")) == 7


# --- what a model is asked, and what becomes of odd answers ---


def asked_of(name: str, one: Sample) -> list[dict[str, Any]]:
    operator: Any = make_operator(name, {"endpoint": "none.yaml"})
    value = operator.value(one)
    return [] if value is None else value[1]


def talk(images: int, *turns: str) -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
    return {"id": "t", "image": ["a.png"] * images, "conversations": said}


@pytest.mark.parametrize("name", ["verify", "expand_answers", "reasoning"])
def test_nothing_is_asked_about_media_that_a_model_is_not_shown(name: str, tmp_path: Path) -> None:
    many = talk(10, "<image>" * 8 + "How many are red?", "2", "<image>" * 2 + "How many are blue?", "3")
    first, second = asked_of(name, sample(tmp_path, many))
    assert len(first["pictures"]) == 8 and first["refused"] == "" and "about the pictures: How many" in first["words"]
    assert second["refused"] == "more than 8 pictures belong to it" and not second["pictures"]
    said = talk(0, "<video>How many men?", "2", "And women?", "3")["conversations"]
    film = {"id": "v", "video": "a.mp4", "conversations": said}
    conversation = parse_record(film)
    found = asked_of(name, Sample("s", "video", 0, conversation, (), (FileSlice(tmp_path / "a.mp4", 0, 9),)))
    assert [one["refused"] for one in found] == ["a video belongs to it"] * 2
    (text,) = asked_of(name, sample(tmp_path, talk(0, "How many days has a week?", "7")))
    assert "picture" not in text["words"] and text["refused"] == ""


def test_what_is_refused_is_noted_and_not_asked(tmp_path: Path) -> None:
    operator: Any = make_operator("verify", {"endpoint": "none.yaml", "judge": "none.yaml"})
    ask = Ask(2, "", refused="a video belongs to it")
    (draft,) = operator._drafted(ask, operator._question(ask))
    assert (draft.does, draft.reason, draft.turn) == ("nothing", "not asked: a video belongs to it", 2)
    assert operator._judging(ask, draft) == Reply("")


def test_a_follow_up_is_asked_with_what_was_said_before(tmp_path: Path) -> None:
    one = sample(tmp_path, talk(1, "<image>What is it?", "A dog.", "How many legs has it?", "4"))
    first, second = asked_of("verify", one)
    assert first["context"] == ""
    assert second["context"] == "The conversation before:\nUser: What is it?\nAssistant: A dog.\n\n"
    operator: Any = make_operator("verify", {"endpoint": "none.yaml"})
    ask = Ask(2, "words", context=second["context"])
    for question_ in (operator._question(ask), operator._judging(ask, Draft("reject", "r", question="q", answer="a"))):
        assert question_.messages[0]["content"].startswith(second["context"])


def drafts(name: str, data: Any, about: dict[str, Any], **settings: Any) -> list[Draft]:
    operator: Any = make_operator(name, {"endpoint": "none.yaml", **settings})
    text = data if isinstance(data, str) else json.dumps(data)
    return list(operator._drafted(Ask(2, "", about=about), Reply(text)))


NUMBER = {"question": "How many dogs?", "answer": "3", "asked": "How many dogs?"}
STEPS = ["First I look at the left.", "Then I count the dogs."]


def test_what_is_no_text_never_becomes_text() -> None:
    (steps,) = drafts("reasoning", {"steps": STEPS, "answer": 3}, NUMBER)
    assert steps.answer == "First I look at the left.\nThen I count the dogs.\n\nAnswer: 3"
    clip = {"question": "What?", "answer": "a", "context": "it goes"}
    odd: list[tuple[str, dict[str, Any], str]] = [
        ("reasoning", {"steps": {"1": "so"}, "answer": 3}, "steps"),
        ("reasoning", {"steps": [*STEPS, 4], "answer": 3}, "steps"),
        ("reasoning", {"steps": STEPS[0] * 2, "answer": [3]}, "answer"),
        ("reasoning", {"steps": STEPS[0] * 2, "answer": True}, "answer"),
        ("expand_answers", {"sentence": ["There are 3.", "Yes"]}, "sentence"),
        ("expand_answers", {"sentence": None}, "sentence"),
        *(("clip_questions", {**clip, key: value}, key) for key, value in
          (("question", ["a"]), ("answer", None), ("context", {"x": 1}))),
    ]  # fmt: skip
    for name, data, key in odd:
        (draft,) = drafts(name, data, {**NUMBER, "clip": (0.0, 1.0)})
        assert (draft.does, draft.reason) == ("nothing", f"no use of the answer: '{key}' is no text"), data


def test_half_a_character_is_an_answer_of_a_wrong_form() -> None:
    for text in ('{"sentence": "There are 3 \\ud83d on it"}', '{"sentence": "There are 3", "why": ["\\ud83d"]}'):
        (draft,) = drafts("expand_answers", text, NUMBER)
        assert (draft.does, draft.reason) == ("nothing", "no use of the answer: not valid Unicode")
    assert Reply("a \ud83d").fault(None) == "not valid Unicode" and Reply("a \U0001f600").fault(None) == ""


def test_each_question_about_a_story_is_judged_and_by_the_descriptions(tmp_path: Path) -> None:
    chapters = [[0.0, 8.0, "Start", "He comes."], [8.0, 24.0, "End", "He leaves, being late."]]
    pairs = [{"question": f"Why does he leave, {n}?", "answer": "He is late."} for n in range(3)]

    def judge(body: dict[str, Any], before: int) -> Act:
        asked = asked_text(body)
        if body["model"] == "model":
            return Act(json.dumps({"questions": pairs}))
        return Act(json.dumps({"good": "He leaves, being late." in asked and "leave, 1?" not in asked}))

    with endpoint_server(judge) as server:
        files = {}
        (tmp_path / "key").write_text(KEY)
        for name in ("model", "judge"):
            files[name] = tmp_path / f"{name}.yaml"
            where = {"url": server.url, "model": name, "key_file": str(tmp_path / "key")}
            files[name].write_text(yaml.safe_dump(where))
        settings = {"endpoint": str(files["model"]), "judge": str(files["judge"]), "answers": str(tmp_path / "answers")}
        one = sample(tmp_path / "s", question("a", "What?", "That.", "a.png"))
        operator: Any = make_operator("story_questions", settings)
        verdicts = operator.run([replace(one, notes={"chapters": chapters})])
    added = [v.finding.text for v in verdicts if v.finding.decision == "added"]
    assert added[::2] == ["Why does he leave, 0?", "Why does he leave, 2?"]
    assert [v.finding.reason for v in verdicts if v.finding.decision == "noted"] == ["refused by the judge"]


@pytest.mark.parametrize(
    ("answer", "sentence", "holds"),
    [
        ("-5", "It is 5 degrees.", False), ("-5", "It is -5 degrees.", True), ("5", "It is -5 degrees.", False),
        ("No", "There is no doubt that it is.", False), ("No", "No, it is not there.", True),
        ("Yes", "Is it? Yes, there.", False), ("1.5", "It is 1.5 m.", True), ("1.5", "1 or 5 of them.", False),
        ("C++", "It is C.", False), ("2,800", "It has 2800 people.", True),
    ],
)  # fmt: skip
def test_a_sentence_holds_the_answers_numbers_and_its_yes_or_no(answer: str, sentence: str, holds: bool) -> None:
    (draft,) = drafts("expand_answers", {"sentence": sentence}, {"question": "What?", "answer": answer})
    assert draft.does == ("change" if holds else "nothing")


@pytest.mark.parametrize(
    ("found", "known", "same"),
    [
        ("-5 °C", "5 °C", False), ("1/2", "1 2", False), ("C++", "C", False), ("3:30", "3 30", False),
        ("-5 °C", "−5 °C", True), ("New York.", "new york", True), ("1,000 people", "1000 people", True),
        ("5.0", "5", True),
    ],
)  # fmt: skip
def test_answers_that_are_one(found: str, known: str, same: bool) -> None:
    assert same_answer("What is it?", found, known) is same


def test_rows_that_sum_up_and_equal_columns_make_no_wrong_answers(tmp_path: Path) -> None:
    assert table_of({"columns": ["shop", "Sales", "sales"], "rows": [["A", "1", "9"]]}) is None
    rows = [["A", "5"], ["B", "10"], ["C", "15"], ["Total", "30"], ["Average", "10"]]
    record = question("a", "What?", "That.", "a.png", metadata={"table": {"columns": ["shop", "sales"], "rows": rows}})
    turns = texts(after("table_questions", {"most": 60}, sample(tmp_path, record))[1])
    answers = dict(zip([text for _, text in turns[2::2]], [text for _, text in turns[3::2]], strict=True))
    assert answers["Which shop has the largest sales?"] == "C" and answers["What is the sales of Total?"] == "30"
    assert answers["What is the sum of sales over all rows but Total and Average?"] == "30"
    assert answers["How many rows but Total and Average have a sales above 5?"] == "2"
