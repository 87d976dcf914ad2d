"""Which questions are asked, and what counts as a right answer."""

import json
from pathlib import Path

from samples import image_bytes, make_tokenizer, write_video

from megatron_eagle.config.data import BlendSource, DataSettings
from megatron_eagle.data.sample.conversation import parse_record
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.shards import StoredSample
from megatron_eagle.data.stream.encode import add_tiles, tokenise
from megatron_eagle.evaluation.answer_log import Answer, AnswerLog
from megatron_eagle.evaluation.prompt import prompts_of
from megatron_eagle.evaluation.questions import questions_of
from megatron_eagle.evaluation.score import Prediction, read_predictions


def sample(turns: list[tuple[str, str]], images: int) -> StoredSample:
    conversations = [{"from": role, "value": text} for role, text in turns]
    record = {"id": "a", "image": [f"{n}.png" for n in range(images)], "conversations": conversations, "task": "t"}
    return StoredSample(parse_record(record), tuple(bytes([n]) for n in range(images)))


def test_every_answer_is_asked_for_with_the_turns_and_images_before_it() -> None:
    turns = [
        ("human", "<image>\nq1"),
        ("gpt", "a1"),
        ("human", "q2"),
        ("gpt", "a2"),
        ("human", "<image>q3"),
        ("gpt", "a3"),
    ]
    questions, rejected = questions_of([sample(turns, 2)])
    assert rejected == {}
    assert [q.conversation.id for q in questions] == ["a#1", "a#2", "a#3"]
    assert [len(q.conversation.turns) for q in questions] == [2, 4, 6]
    assert [q.images for q in questions] == [(b"\0",), (b"\0",), (b"\0", b"\1")]
    assert all(q.conversation.extra == {"task": "t"} for q in questions)


def test_a_single_question_keeps_its_id() -> None:
    (question,), _ = questions_of([sample([("human", "q"), ("gpt", "a")], 0)])
    assert question.conversation.id == "a"


def named(identity: str, turns: list[tuple[str, str]]) -> StoredSample:
    record = {"id": identity, "conversations": [{"from": role, "value": text} for role, text in turns]}
    return StoredSample(parse_record(record), ())


def test_a_question_ends_with_its_own_answer_and_what_cannot_be_asked_is_named() -> None:
    samples = [
        named("trail", [("human", "first?"), ("gpt", "one"), ("human", "second?")]),
        named("greets", [("gpt", "Hello"), ("human", "then?"), ("gpt", "reply")]),
        named("only", [("gpt", "Only me")]),
        named("system", [("system", "Be brief."), ("gpt", "Yes.")]),
        named("empty", [("human", "What?"), ("gpt", " ")]),
    ]
    questions, rejected = questions_of(samples)
    asked = {q.conversation.id: [turn.text for turn in q.conversation.turns] for q in questions}
    assert asked == {"trail": ["first?", "one"], "greets#2": ["Hello", "then?", "reply"]}
    assert rejected == {
        "greets#1": "answer 1 has no question before it",
        "only": "answer 1 has no question before it",
        "system": "answer 1 has no question before it",
        "empty": "answer 1 is empty",
    }
    assert len(questions) + len(rejected) == 6, "one fate for every answer"


def test_an_answer_that_is_not_learned_is_context_of_the_next() -> None:
    turns = [("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2"), ("human", "q3"), ("gpt", "a3")]
    record = {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns]}
    record["conversations"][1]["loss"] = record["conversations"][5]["loss"] = False
    questions, rejected = questions_of([StoredSample(parse_record(record), ())])
    assert [q.conversation.id for q in questions] == ["x#2"]
    assert [turn.text for turn in questions[0].conversation.turns] == ["q1", "a1", "q2", "a2"]
    why = "is context only ('loss' or 'weight' says so)"
    assert rejected == {"x#1": f"answer 1 {why}", "x#3": f"answer 3 {why}"}


def test_two_questions_never_share_an_id() -> None:
    two = [("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2")]
    one = [("human", "other"), ("gpt", "answer")]
    questions, _ = questions_of([named("x", two), named("x#1", one), named("x", two), named("x#1~2", one)])
    ids = [question.conversation.id for question in questions]
    assert ids == ["x#1", "x#2", "x#1~2", "x#1~3", "x#2~2", "x#1~2~2"]


def test_answers_are_kept_through_a_torn_line_and_only_for_the_same_run(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path)
    assert log.open({"checkpoint": "a"}) == {}
    log.append(0, True, {"x": Answer("one", True), "ü": Answer("zwei\n", False)})
    with (log.folder / "answers_00000.jsonl").open("a") as file:
        file.write('{"id": "torn", "looking": tr')
    log.append(0, False, {"x": Answer("blank", True)})
    kept = {("x", True): Answer("one", True), ("ü", True): Answer("zwei\n", False), ("x", False): Answer("blank", True)}
    assert AnswerLog(tmp_path).open({"checkpoint": "a"}) == kept
    assert AnswerLog(tmp_path).open({"checkpoint": "b"}) == {}


def test_only_surrounding_space_is_forgiven() -> None:
    def verdict(prediction: str) -> bool:
        return Prediction("i", "t", "q", "red", prediction, "").correct

    assert verdict("red") and verdict(" red\n")
    assert not verdict("Red") and not verdict("red.") and not verdict("")


def test_predictions_are_read_back(tmp_path: Path) -> None:
    line = {"id": "i", "task": "t", "question": "q", "answer": "a", "prediction": "p", "blank_prediction": "b"}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    assert read_predictions(tmp_path) == [Prediction(**line)]


def test_questions_are_cut_as_in_training_and_broken_ones_are_left_out_by_name(tmp_path: Path) -> None:
    """An image, a video and a damaged image: prompts are the beginning of what training would have read."""

    def question(name: str, marker: str, kind: str) -> StoredSample:
        turns = [{"from": "human", "value": f"{marker}\nWhat is number 1?"}, {"from": "gpt", "value": "It is red."}]
        conversation = parse_record({"id": name, kind: ["x"], "conversations": turns})
        media = {
            "picture": image_bytes((130, 70), "red"),
            "film": write_video(tmp_path / "film.mp4", 30).read_bytes(),
            "damaged": image_bytes((130, 70), "red")[:40],
        }[name]
        return StoredSample(conversation, *(((media,), ()) if kind == "image" else ((), (media,))))

    settings = DataSettings(sources=(BlendSource("x"),), pack_length=512, tile_size=32, tokens_per_tile=4)
    planner = VisualPlanner(settings, make_tokenizer(tmp_path))
    questions = [
        question("picture", "<image>", "image"),
        question("film", "<video>", "video"),
        question("damaged", "<image>", "image"),
    ]
    prompts, rejected = prompts_of(questions, planner)
    assert [prompt.identity for prompt in prompts] == ["picture", "film"]
    assert list(rejected) == ["damaged"] and "image" in rejected["damaged"]
    for prompt, stored in zip(prompts, questions[:2], strict=True):
        segment, cut = tokenise(stored, planner)
        trained = add_tiles(segment, stored, cut, settings)
        assert len(prompt.tiles) > 1 and prompt.tiles.equal(trained.tiles)
        assert prompt.tokens == trained.tokens[: len(prompt.tokens)].tolist()
        assert (trained.labels[: len(prompt.tokens)] < 0).all() and trained.labels[len(prompt.tokens)] >= 0
