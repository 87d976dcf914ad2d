"""Which questions are asked, and what counts as a right answer."""

import json
from pathlib import Path

from samples import image_bytes, make_tokenizer, write_video

from megatron_eagle.config.data import BlendSource, DataSettings
from megatron_eagle.data.sample.conversation import parse_record
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.shards import StoredSample
from megatron_eagle.data.stream.encode import add_tiles, tokenise
from megatron_eagle.evaluation.score import Prediction, _prompts, read_predictions, split_questions


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
    questions = split_questions(sample(turns, 2))
    assert [q.conversation.id for q in questions] == ["a#1", "a#2", "a#3"]
    assert [len(q.conversation.turns) for q in questions] == [2, 4, 6]
    assert [q.images for q in questions] == [(b"\0",), (b"\0",), (b"\0", b"\1")]
    assert all(q.conversation.extra == {"task": "t"} for q in questions)


def test_a_single_question_keeps_its_id() -> None:
    (question,) = split_questions(sample([("human", "q"), ("gpt", "a")], 0))
    assert question.conversation.id == "a"


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
    prompts, rejected = _prompts(questions, planner)
    assert [prompt.identity for prompt in prompts] == ["picture", "film"]
    assert list(rejected) == ["damaged"] and "image" in rejected["damaged"]
    for prompt, stored in zip(prompts, questions[:2], strict=True):
        segment, cut = tokenise(stored, planner)
        trained = add_tiles(segment, stored, cut, settings)
        assert len(prompt.tiles) > 1 and prompt.tiles.equal(trained.tiles)
        assert prompt.tokens == trained.tokens[: len(prompt.tokens)].tolist()
        assert (trained.labels[: len(prompt.tokens)] < 0).all() and trained.labels[len(prompt.tokens)] >= 0
