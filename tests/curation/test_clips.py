"""Films: clips by length and by shots, the novelty of vectors, and what a model behind a real endpoint says of them."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from encoder_models import write_torchscript
from endpoint_server import KEY, Act, asked_text, endpoint_server
from PIL import Image
from samples import frame_number, write_jsonl, write_video

from megatron_eagle.curation.clips import Film, clip_times, clips_by_length, clips_by_shots
from megatron_eagle.curation.engine import curate
from megatron_eagle.curation.novelty import most_alike
from megatron_eagle.curation.operator import Row, SetOperator, make_operator
from megatron_eagle.curation.operators.chapters import chapters_of
from megatron_eagle.curation.plan import Plan, load_plan
from megatron_eagle.curation.sample import Sample
from megatron_eagle.curation.vectors import VectorStore
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.video import read_info
from megatron_eagle.data.sample.conversation import parse_record
from megatron_eagle.errors import UserError


@pytest.mark.parametrize(
    ("start", "end", "clips"),
    [
        (0, 30, [(0, 10), (10, 20), (20, 30)]),
        (0, 31, [(0, 10), (10, 20), (20, 31)]),
        (5, 29, [(5, 15), (15, 25), (25, 29)]),
        (0, 1.5, [(0, 1.5)]),
        (0, 9, [(0, 9)]),
        (0, 12, [(0, 10), (10, 12)]),
    ],
)
def test_clips_of_a_length_cover_the_film(start: float, end: float, clips: list[tuple[float, float]]) -> None:
    assert clips_by_length(start, end, 10, 2) == clips


def coloured(path: Path, shots: list[tuple[str, float]], rate: int = 8) -> Path:
    """A film of shots of one colour each, with a little square that moves."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.thread_count = 1
        number = 0
        for colour, seconds in shots:
            for _ in range(round(seconds * rate)):
                picture = Image.new("RGB", (96, 64), colour)
                picture.paste("white", (number % 80, 20, number % 80 + 12, 32))
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
                number += 1
        container.mux(stream.encode())
    return path


def test_clips_by_shots_begin_at_the_cuts(tmp_path: Path) -> None:
    path = coloured(tmp_path / "a.mp4", [("red", 4), ("blue", 3), ("green", 0.5), ("black", 9)])
    file = FileSlice.whole(path)
    film = Film(file, read_info(file))
    assert clips_by_shots(film, 4, 0.4, 2, 100) == [(0, 4), (4, 7), (7, 16.5)], "green is too short for a clip"
    assert clips_by_shots(film, 4, 0.4, 2, 5) == [(0, 4), (4, 7), (7, 11.75), (11.75, 16.5)]
    assert clips_by_shots(film, 4, 0.4, 0.5, 100) == [(0, 4), (4, 7), (7, 7.5), (7.5, 16.5)]


def test_times_of_a_clip() -> None:
    assert clip_times((10, 12), 2, 50) == (10, 10.5, 11, 11.5) and clip_times((3, 3.1), 2, 50) == (3,)
    assert len(clip_times((0, 600), 2, 50)) == 50 and max(clip_times((0, 600), 2, 50)) < 600


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_the_most_alike_is_that_of_brute_force(block: int) -> None:
    random = np.random.default_rng(3)
    one, other = (random.normal(size=(rows, 16)).astype(np.float32) for rows in (101, 230))
    one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other))
    best, where = most_alike(one, other, block)
    cosines = one @ other.T
    assert np.abs(best - cosines.max(axis=1)).max() < 1e-6 and (where == cosines.argmax(axis=1)).all()
    assert most_alike(one, other[:0])[1].tolist() == [-1] * 101


def test_chapters_that_are_none_are_not_taken() -> None:
    good = [{"start": 0, "title": "a"}, {"start": 5, "end": 9, "title": "b"}, {"start": 9, "title": "c"}]
    assert chapters_of(good, 12.0) == [(0, 5, "a"), (5, 9, "b"), (9, 12, "c")]
    for wrong in (
        None, 3, [1], [{"title": "a"}], [{"start": 0, "title": " "}], [{"start": 5, "end": 4, "title": "a"}],
        [{"start": 0, "end": 20, "title": "a"}], [{"start": 3, "end": 9, "title": "a"}, {"start": 5, "title": "b"}],
        [{"start": float("nan"), "title": "a"}],
    ):  # fmt: skip
        assert chapters_of(wrong, 12.0) == [], wrong


def colour_films(folder: Path) -> tuple[Path, Path]:
    """Two sources: what is trained on is red and blue; of the candidates one is half green, and one is blue."""
    paths = folder / "trained", folder / "new"
    for path in paths:
        path.mkdir(parents=True)
    coloured(paths[0] / "a.mp4", [("red", 10), ("blue", 10)])
    coloured(paths[1] / "mixed.mp4", [("red", 10), ("lime", 10)])
    coloured(paths[1] / "same.mp4", [("blue", 12)])
    write_jsonl(paths[0], [record("old")])
    write_jsonl(paths[1], [record("mixed", "mixed.mp4"), record("same", "same.mp4"), record("again", "mixed.mp4")])
    return paths


def novelty_plan(folder: Path, trained: Path, new: Path, **settings: Any) -> Plan:
    small = {"side": 32, "batch": 8}
    plan = {
        "name": "new", "block": 2,
        "sources": [
            {"name": "new", "path": str(new / "samples.jsonl")},
            {"name": "trained", "path": str(trained / "samples.jsonl"), "benchmark": True},
        ],
        "operators": [
            {"use": "clips"},
            {"use": "novelty", "images": str(folder / "sscd.pt"), "cache": str(folder / "v"), **small, **settings},
        ],
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    return load_plan(folder / "plan.json")


def test_films_without_anything_new_are_left(tmp_path: Path) -> None:
    trained, new = colour_films(tmp_path / "films")
    write_torchscript(tmp_path / "sscd.pt")
    curate(novelty_plan(tmp_path, trained, new), tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "ledger.parquet").to_pylist()
    found = {row["sample"]: row for row in rows if row["operator"] == "novelty"}
    assert {name: (row["decision"], dict(row["scores"])["new"]) for name, row in found.items()} == {
        "mixed": ("noted", 1), "same": ("left", 0), "again": ("noted", 1)
    }  # fmt: skip
    assert found["same"]["detail"] == "0 of 2 clips are new, one is like trained/old"
    assert dict(found["same"]["scores"])["cosine"] > 0.95
    curate(novelty_plan(tmp_path, trained, new, most=1.0), tmp_path / "all")
    lines = (tmp_path / "all" / "kept" / "new" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 3, "a cosine of 1 is not reached by frames that were encoded anew"
    with pytest.raises(UserError, match="model .*none.pt does not exist"):
        curate(novelty_plan(tmp_path, trained, new, images=str(tmp_path / "none.pt")), tmp_path / "x")


def test_films_that_were_not_cut_are_counted_and_stay(tmp_path: Path) -> None:
    trained, new = colour_films(tmp_path / "films")
    write_torchscript(tmp_path / "sscd.pt")
    novelty_plan(tmp_path, trained, new)
    raw = json.loads((tmp_path / "plan.json").read_text())
    raw["sources"].append({"name": "uncut", "path": str(new / "samples.jsonl")})
    raw["operators"][0]["sources"] = ["new"]
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    found = curate(load_plan(tmp_path / "plan.json"), tmp_path / "out").sources
    assert {one.name: one.used for one in found} == {"new": 2, "uncut": 3}
    assert [one.notes for one in found] == [(), ("not compared: 3 samples with films that 'clips' did not cut",)]


def test_a_film_without_clips_has_none_that_is_new() -> None:
    operator = make_operator("novelty", {"images": "m"})
    assert isinstance(operator, SetOperator)
    film = FileSlice(Path("none.mp4"), 0, 0)
    turns = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "a"}]
    sample = Sample("a", "c", 0, parse_record({"id": "x", "video": "none.mp4", "conversations": turns}), (), (film,))
    assert operator.value(replace(sample, notes={"clips": [[]]})) == ["", []] == operator.value(sample)
    (verdict,) = operator.decide(iter([Row(("a", 0), "x", "c", ["", []])]))
    assert (verdict.key, verdict.finding.decision) == (("a", None), "noted")


def test_benchmarks_without_films_are_nothing_to_compare_with(tmp_path: Path) -> None:
    _, new = colour_films(tmp_path / "films")
    write_torchscript(tmp_path / "sscd.pt")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Numbers."}]
    (tmp_path / "words").mkdir()
    write_jsonl(tmp_path / "words", [{"id": "w", "conversations": turns}])
    with pytest.raises(UserError, match="'novelty': 6 clips of 3 samples have nothing to be compared with: no benchm"):
        curate(novelty_plan(tmp_path, tmp_path / "words", new), tmp_path / "out")


def test_a_cosine_is_compared_as_it_is_written_down(tmp_path: Path) -> None:
    store = VectorStore(tmp_path)
    cosine = 0.49999  # 0.5 where the last digits fall otherwise
    store.add([1, 2], np.array([[1, 0], [cosine, np.sqrt(1 - cosine**2)]], np.float32))
    operator = make_operator("novelty", {"images": "m", "most": 0.5})
    assert isinstance(operator, SetOperator)
    rows = [Row(("b", 0), "t", "c", [str(tmp_path), [[((0, 1), [1])]]], benchmark=True)]
    rows.append(Row(("a", 0), "n", "c", [str(tmp_path), [[((0, 1), [2])]]]))
    (verdict,) = operator.decide(iter(rows))
    assert verdict.finding.decision == "left" and verdict.finding.scores["cosine"] == 0.5


def test_only_new_clips_are_asked_about(tmp_path: Path) -> None:
    trained, new = colour_films(tmp_path / "films")
    write_torchscript(tmp_path / "sscd.pt")
    novelty_plan(tmp_path, trained, new)
    raw = json.loads((tmp_path / "plan.json").read_text())
    with endpoint_server(lambda body, before: Act('{"question": "What?", "answer": "a", "context": "b"}')) as server:
        (tmp_path / "model.yaml").write_text(f"{{url: '{server.url}', model: m, key_file: '{tmp_path / 'key'}'}}")
        (tmp_path / "key").write_text(KEY)
        asking = {"endpoint": str(tmp_path / "model.yaml"), "answers": str(tmp_path / "answers")}
        raw["operators"].append({"use": "clip_questions", **asking, "anchors": ["time"]})
        (tmp_path / "plan.json").write_text(json.dumps(raw))
        curate(load_plan(tmp_path / "plan.json"), tmp_path / "out")
    lines = map(json.loads, (tmp_path / "out" / "kept" / "new" / "samples.jsonl").read_text().splitlines())
    asked = {one["id"]: [turn["value"] for turn in one["conversations"][2::2]] for one in lines}
    assert asked == {name: ["From 10.0 to 20.0 seconds: what?"] for name in ("mixed", "again")}


# --- a model ---


def shown(body: dict[str, Any]) -> list[int]:
    """Which frames of the film, by their own numbers, a request shows."""
    parts = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    data = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in parts]
    return [frame_number(np.asarray(Image.open(io.BytesIO(one)).convert("RGB"))) for one in data]


def films_plan(folder: Path, url: str, operators: list[dict[str, Any]], records: list[dict[str, Any]]) -> Plan:
    folder.mkdir(exist_ok=True)
    write_video(folder / "a.mp4", 240)  # 24 s
    write_jsonl(folder, records)
    (folder / "key").write_text(KEY)
    (folder / "model.yaml").write_text(f"{{url: '{url}', model: m, first_wait: 0.01, key_file: '{folder / 'key'}'}}")
    asking = {"endpoint": str(folder / "model.yaml"), "answers": str(folder / "answers")}
    free = ("clips",)
    plan = {
        "name": "films", "sources": [{"name": "films", "path": str(folder / "samples.jsonl")}],
        "operators": [one if one["use"] in free else {**asking, **one} for one in operators],
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    return load_plan(folder / "plan.json")


def record(identity: str, video: Any = "a.mp4", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "Numbers."}]
    return {"id": identity, "video": video, "conversations": turns, **more}


def kept(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "kept" / "films" / "samples.jsonl").read_text().splitlines()
    return {one["id"]: one for one in map(json.loads, lines)}


def test_questions_about_clips_carry_their_anchors(tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {}

    def model(body: dict[str, Any], before: int) -> Act:
        numbers = shown(body)
        seen[str(numbers[0])] = numbers
        answer = {"question": "What is counted?", "answer": "frames", "context": f"number {numbers[0]} comes."}
        if numbers[0] == 100:
            answer["context"] = "the frames are seen"
        return Act(json.dumps(answer))

    records = [record("whole"), record("part", {"path": "a.mp4", "start": 12.0, "end": 22.0})]
    with endpoint_server(model) as server:
        plan = films_plan(tmp_path, server.url, [{"use": "clips"}, {"use": "clip_questions"}], records)
        curate(plan, tmp_path / "out")
    assert seen["0"] == list(range(0, 100, 5)) and seen["200"] == [200, 205, 210, 215, 220, 225, 230, 235]
    assert seen["120"] == list(range(120, 220, 5)), "a clip of a film is looked at where it lies in the film"
    whole = [turn["value"] for turn in kept(tmp_path / "out")["whole"]["conversations"][2:]]
    assert whole[::2] == [
        "From 0.0 to 10.0 seconds: what is counted?",
        "In the part of the video in which number 0 comes: what is counted?",
        "From 20.0 to 24.0 seconds: what is counted?",
        "In the part of the video in which number 200 comes: what is counted?",
    ] and set(whole[1::2]) == {"frames"}  # fmt: skip
    part = kept(tmp_path / "out")["part"]["conversations"][2]["value"]
    assert part == "From 0.0 to 10.0 seconds: what is counted?", "time is counted as the frames are labelled"
    reasons = json.loads((tmp_path / "out" / "summary.json").read_text())["sources"][0]["reasons"]
    assert reasons["clip_questions: the context or the question gives the answer away (noted)"] == 1
    build_dataset(tmp_path / "out" / "kept" / "films" / "samples.jsonl", tmp_path / "built")
    assert (tmp_path / "built" / "rejected.jsonl").read_text() == ""


def test_a_story_is_told_from_chapters(tmp_path: Path) -> None:
    def model(body: dict[str, Any], before: int) -> Act:
        asked = asked_text(body)
        if "frames of one chapter" in asked:
            return Act(f"It counts from {shown(body)[0]} to {shown(body)[-1]}.")
        assert "0.0 to 8.0 seconds, Start: It counts from 0 to 75." in asked
        assert "8.0 to 24.0 seconds, End: It counts from 80 to 235." in asked
        pairs = [{"question": f"How does it go on, {n}?", "answer": "It counts on."} for n in range(4)]
        return Act(json.dumps({"questions": pairs}))

    chapters = [{"start": 0, "title": "Start"}, {"start": 8, "title": "End"}]
    records = [
        record("story", metadata={"chapters": chapters}),
        record("one", metadata={"chapters": chapters[:1]}),
        record("none"),
    ]
    use = [{"use": "chapters"}, {"use": "story_questions", "most": 2}]
    with endpoint_server(model) as server:
        curate(films_plan(tmp_path, server.url, use, records), tmp_path / "out")
    turns = {name: one["conversations"] for name, one in kept(tmp_path / "out").items()}
    assert [len(turns[name]) for name in ("story", "one", "none")] == [6, 2, 2]
    assert turns["story"][2]["value"] == "How does it go on, 0?" and turns["story"][5]["value"] == "It counts on."


def test_chapters_are_those_of_the_part_that_is_shown(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 240)  # 24 s
    file = FileSlice.whole(tmp_path / "a.mp4")
    operator: Any = make_operator("chapters", {"endpoint": "none.yaml"})

    def asked(chapters: Any) -> list[Any]:
        part = record("part", [{"path": "a.mp4", "start": 10.0, "end": 20.0}], metadata={"chapters": chapters})
        return list(operator.asks(Sample("s", "video", 0, parse_record(part), (), (file,))))

    starts = [{"start": start, "title": f"from {start}"} for start in (0, 5, 14, 18, 21)]
    found = asked(starts)
    assert [one.about["clip"] for one in found] == [(0, 4), (4, 8), (8, 10)]
    assert all(10 <= time < 20 for one in found for time in one.times)
    assert asked(starts[:2]) == [], "one chapter is no story"
    for wrong in ([{"start": 0, "title": None}], [*starts, {"start": 3, "title": "back"}], "none"):
        assert [one.refused for one in asked(wrong)] == ["chapters that cannot be used"], wrong


def test_anchors_that_are_none_are_refused() -> None:
    for anchors in ([], ["time", "time"]):
        with pytest.raises(ValueError, match="anchors has none, or one twice"):
            make_operator("clip_questions", {"endpoint": "none.yaml", "anchors": anchors})


def test_an_operator_that_needs_anothers_output_says_so(tmp_path: Path) -> None:
    for use, missing in (("clip_questions", "clips"), ("story_questions", "chapters")):
        with pytest.raises(
            Exception, match=f"operator '{use}' reads what '{missing}' notes, which must come before it"
        ):
            films_plan(tmp_path, "http://127.0.0.1:9/v1", [{"use": use}], [record("a")])
    sources = [{"name": "a", "path": "a.jsonl"}]
    use = [{"use": "clips"}, {"use": "novelty", "images": "x"}]
    (tmp_path / "plan.json").write_text(json.dumps({"name": "n", "sources": sources, "operators": use}))
    with pytest.raises(UserError, match="nothing to compare with: no source .of films trained on. is a benchmark"):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="least is 3 s, more than the 2 s that a clip has"):
        make_operator("clips", {"seconds": 2, "least": 3})
