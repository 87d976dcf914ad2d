"""Records of the field: media and turns under every key that is known, and an error that names every other one."""

import itertools

import pytest
from form_samples import asks, conversation, reason, says, texts

from megatron_eagle.data.sample.conversation import Turn

AB = ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("key", ["image", "images", "image_list"])
@pytest.mark.parametrize("value", ["a.jpg", ["a.jpg"], {"path": "a.jpg"}, [{"path": "a.jpg", "bytes": None}]])
def test_images_under_any_key(key, value):
    made = conversation(asks("What?", **{key: value}))
    assert (made.images, made.videos, texts(made)[0], made.extra) == (("a.jpg",), (), "<image>\nWhat?", {})


@pytest.mark.parametrize("key", ["video", "videos", "video_list"])
@pytest.mark.parametrize("value", ["v.mp4", ["v.mp4"], {"path": "v.mp4"}, {"video": "v.mp4"}])
def test_videos_under_any_key(key, value):
    made = conversation(asks("What?", **{key: value}))
    assert (made.images, made.videos, texts(made)[0]) == ((), ("v.mp4",), "<video>\nWhat?")


def test_eagles_data():
    images, films = {"type": "image", "image_list": AB}, {"type": "video", "video_list": ["v.mp4"]}
    made = conversation(asks("<image-1><video-1><image-2>\nWhat?", data=[images, films]))
    assert made.images == ("a.jpg", "b.jpg") and made.videos == ("v.mp4",)
    assert texts(made)[0] == "<image><video><image>\nWhat?"
    assert texts(conversation(asks("What?", data=[films, images])))[0] == "<image>\n<image>\n<video>\nWhat?"
    # A kind that no marker names goes before the text (Eagle's note on placeholders).
    assert texts(conversation(asks("See <image-2>", data=[images, films])))[0] == "<image>\n<video>\nSee <image>"
    assert conversation(asks("What?", data=[])).images == ()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([{"type": "audio", "audio_list": ["a.wav"]}], "'data' has type 'audio'"),
        ([{"type": "image", "image_list": ["a"]}] * 2, "'data' lists images twice"),
        ([{"type": "image", "images": ["a"]}], "'data' has 'images', which is not understood"),
        ({"type": "image", "image_list": ["a"]}, "'data' is no list of"),
        ([{"type": "image", "image_list": [{"lmdb_file": "f", "lmdb_key": "k"}]}], "lies in LMDB"),
        (
            [{"type": "video", "video_list": [{"path": "v.mp4", "start": 1, "end": 1}]}],
            "a clip from 1 to 1 seconds, which is empty",
        ),
    ],
)
def test_data_that_is_not_understood(data, why):
    assert why in reason(asks("What?", data=data))


@pytest.mark.parametrize("pair", itertools.combinations(["image", "images", "image_list"], 2))
def test_media_under_two_keys_are_refused(pair):
    assert "images under several keys" in reason(asks("What?", **dict.fromkeys(pair, "a.jpg")))
    assert "under several keys" in reason(asks("?", image="a.jpg", data=[{"type": "image", "image_list": ["b.jpg"]}]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Image", "a.jpg"), ("image_path", "a.jpg"), ("pictures", ["a.jpg"]), ("img", "a.jpg"), ("IMAGES", ["a.jpg"]),
        ("media", {"image": "a.jpg"}), ("frames", ["a.jpg"]), ("system_message", "Be brief."), ("solution", "Yes."),
        ("context", "Once upon a time."), ("url", "https://example.org/a.jpg"), ("weight", 0.5), ("anything", 0),
    ],
)  # fmt: skip
def test_a_key_that_is_not_understood_is_named(key, value):
    assert f"record: key {key!r} is not understood" in reason(asks("What?", **{key: value}))
    for ignore in (key, "all"):
        assert conversation(asks("What?", **{key: value}), (ignore,)).images == ()


def test_the_nearest_key_is_suggested():
    assert "did you mean 'images'?" in reason(asks("What?", imagess=["a.jpg"]))


def test_empty_values_and_what_is_about_a_sample_say_nothing():
    empty = {"videos": None, "images": [], "audios": [], "tools": "", "chosen": None, "whatever": None, "strange": []}
    made = conversation(asks("What?", task="t", dataset="d", metadata={"year": 1999, "by": ["a", "b"]}, **empty))
    assert made.images == () and made.extra["task"] == "t" and made.extra["metadata"]["year"] == 1999


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("source", "a.jpg"), ("metadata", {"image": "b.png"}), ("metadata", {"file": "b.mp4"}),
        ("note", ["x", "y.PNG"]),
        ("meta", {"messages": [{"role": "user"}]}), ("info", {"system": "Be brief."}),
        ("comment", "data:image/png;base64,"),
    ],
)  # fmt: skip
def test_no_medium_hides_in_a_harmless_key(key, value):
    assert key in reason(asks("What?", **{key: value}))
    assert conversation(asks("What?", **{key: value}), (key,)).images == ()


def test_naming_a_shown_medium_again_is_fine():
    assert conversation(asks("What?", image="x/a.jpg", source="coco/a.jpg", image_id="a.jpg")).images == ("x/a.jpg",)


WORDS = {"type": "text", "text": "?"}
PART_IMAGES = [
    {"type": "image", "image": "a.jpg"}, {"type": "image", "path": "a.jpg"}, {"type": "image", "url": "a.jpg"},
    {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "high"}}, {"type": "image_url", "image_url": "a.jpg"},
    {"type": "image_url", "value": "a.jpg"}, {"type": "input_image", "image_url": "a.jpg"}, {"image": "a.jpg"},
    {"type": "image", "image": {"path": "a.jpg", "bytes": None}},
]  # fmt: skip


@pytest.mark.parametrize("part", PART_IMAGES)
def test_parts(part):
    content = [part, {"type": "text", "text": "What?"}]
    answer = [{"type": "text", "value": "A cat."}]
    made = conversation({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    assert made.turns == (Turn("user", "<image>What?"), Turn("assistant", "A cat."))
    assert made.images == ("a.jpg",) and made.id == "default"


def test_parts_keep_their_places_and_may_be_slots():
    content = [
        {"type": "text", "text": "First "},
        {"type": "image"},
        {"text": " then "},
        {"type": "video"},
        {"type": "image"},
    ]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    made = conversation({"messages": turns, "images": AB, "videos": ["v.mp4"]})
    assert texts(made)[0] == "First <image> then <video><image>" and made.images == ("a.jpg", "b.jpg")
    content[1]["index"], content[4]["index"] = 1, 0
    content[0]["index"] = None
    made = conversation({"messages": turns, "images": AB, "videos": ["v.mp4"]})
    assert made.images == ("b.jpg", "a.jpg") and made.image_numbers == (2, 1)


@pytest.mark.parametrize(
    ("content", "fields", "why"),
    [
        ([{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "<image>?"}], {}, "holds <image> beside media"),
        ([{"type": "image", "image": "a.jpg"}, WORDS], {"images": ["b.jpg"]}, "beside the turns and in them"),
        ([{"type": "image"}, WORDS], {}, "more <image> markers than images"),
        ([{"type": "audio", "audio": "a.wav"}, WORDS], {}, "turn 1 part 1 is of type 'audio'"),
        ([{"type": "image", "image": "a.jpg", "max_pixels": 9}, WORDS], {}, "turn 1 part 1: "),
        ([{"type": "video", "video": "v.mp4", "fps": 1}, WORDS], {}, "turn 1 part 1: "),
        ([{"type": "text", "text": "?", "cache": 1}], {}, "key 'cache' is not understood"),
        ([3], {}, "turn 1 part 1 is a int"),
        (["a.jpg", "What?"], {}, "turn 1 part 1 is a str"),
        ([{"type": "image_url", "image_url": {"url": "https://x.org/a.jpg"}}], {}, "is a URL; only files are read"),
    ],
)
def test_parts_that_are_not_understood(content, fields, why):
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    assert why in reason({"messages": turns, **fields})


@pytest.mark.parametrize(
    ("key", "kind"), [("image", "image"), ("images", "image"), ("video", "video"), ("videos", "video")]
)
def test_a_turns_own_media(key, kind):
    for value in ("x", ["x"]):
        record = says(("human", "First?"), ("gpt", "One."), ("human", "Second?"), ("gpt", "Two."))
        record["conversations"][2][key] = value
        made = conversation(record)
        assert texts(made)[2] == f"<{kind}>\nSecond?" and texts(made)[0] == "First?"
        assert made.names(kind) == ("x",)
    record["conversations"][2]["value"] = f"Second, <{kind}>?"
    assert texts(conversation(record))[2] == f"Second, <{kind}>?"


def test_own_media_of_several_turns_and_of_answers():
    record = says(("human", "<image> <image>?"), ("gpt", "One."), ("human", "?"), ("gpt", "Two."))
    record["conversations"][0]["images"], record["conversations"][2]["images"] = AB, ["c.jpg"]
    assert conversation(record).images == ("a.jpg", "b.jpg", "c.jpg")
    record["conversations"][0]["images"] = ["a.jpg"]
    assert "turn 1 has 2 <image> markers and 1 images of its own" in reason(record)
    record["conversations"][0]["images"] = AB
    assert "beside the turns and in them" in reason({**record, "image": "d.jpg"})
    record["conversations"][3]["image"] = "d.jpg"
    assert "turn 4, from gpt/assistant, holds an <image> marker" in reason(record)
    both = asks("?")
    both["conversations"][0] |= {"image": "a.jpg", "images": ["b.jpg"]}
    assert "under several keys" in reason(both)


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_the_system_text_is_shown(key):
    assert conversation(asks("Hello", **{key: "French only."})).turns[0] == Turn("system", "French only.")
    assert conversation(asks("Hello", **{key: ""})).turns[0].role == "user"
    same = says(("system", "French only."), ("human", "Hello"), ("gpt", "Salut"), **{key: "French only."})
    assert len(conversation(same).turns) == 3
    assert "both from system, and differ" in reason({**same, key: "German only."})
    assert "one system text is wanted" in reason(asks("Hello", system="a", system_prompt="b"))


@pytest.mark.parametrize("key", ["tools", "functions", "audios", "audio", "chosen", "rejected"])
def test_known_and_refused(key):
    assert f"record: key {key!r}: " in reason(asks("Hello", **{key: ["x"]}))
    assert conversation(asks("Hello", **{key: ["x"]}), (key,)).extra == {}


@pytest.mark.parametrize("role", ["tool", "function_call", "developer", "USER"])
def test_a_role_that_is_not_known(role):
    assert f"is from {role!r}" in reason(says(("human", "Hello"), (role, "x"), ("gpt", "Yes.")))


@pytest.mark.parametrize(
    ("said", "learned"),
    [
        ({"loss": False}, False), ({"loss": True}, True), ({"weight": 0}, False), ({"weight": 1.0}, True),
        ({"loss": False, "weight": 0}, False), ({"loss_weight": 0.0}, False), ({"loss": None}, True), ({}, True),
    ],
)  # fmt: skip
def test_whether_a_turn_is_learned(said, learned):
    record = says(("human", "q"), ("gpt", "first"), ("human", "no"), ("gpt", "second"))
    record["conversations"][1] |= said
    made = conversation(record)
    assert [turn.learned for turn in made.turns] == [True, learned, True, True]
    again = conversation(made.to_record([]))
    assert again.turns == made.turns


@pytest.mark.parametrize(
    ("turn", "said", "why"),
    [
        (1, {"weight": 0.5}, "turn 2 has weight 0.5; an answer is learned (1) or not (0)"),
        (1, {"loss": "no"}, "turn 2 has loss no"),
        (1, {"weight": 2}, "turn 2 has weight 2"),
        (1, {"loss": True, "weight": 0}, "turn 2 contradicts itself: loss 1, weight 0"),
        (0, {"loss": True}, "turn 1, from user, asks to be learned"),
        (1, {"loss": False}, "nothing to learn: no answer is learned"),
        (1, {"feedback": "good"}, "turn 2: key 'feedback' is not understood"),
        (1, {"tool_calls": [{"id": 1}]}, "turn 2: key 'tool_calls' is not understood"),
        (0, {"pictures": ["a.jpg"]}, "turn 1: key 'pictures' is not understood"),
        (0, {"content": "twice"}, "turn 1 says the same twice: from, value, content"),
        (0, {"role": "user"}, "turn 1 says the same twice"),
    ],
)
def test_what_a_turn_says_beside_its_text(turn, said, why):
    record = asks("q")
    record["conversations"][turn] |= said
    assert why in reason(record)


def test_a_turns_unknown_key_can_be_ignored():
    record = asks("q")
    record["conversations"][1]["feedback"] = "good"
    assert texts(conversation(record, ("feedback",))) == texts(conversation(record, ("all",))) == ["q", "Yes."]


def test_questions_and_answers_in_keys_of_their_own():
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Count.", "history": [["Hi", "Hello"]]}
    assert texts(conversation(alpaca)) == ["Count.", "Hi", "Hello", "Add.\n1 2", "3"]
    swift = {"query": "<image>What?", "response": "A cat.", "history": [], "images": ["a.jpg"]}
    assert texts(conversation(swift)) == ["<image>What?", "A cat."] and conversation(swift).images == ("a.jpg",)
    assert texts(conversation({"response": "Text alone."})) == ["Text alone."]
    pairs = {"conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}], "system": "s"}
    assert texts(conversation(pairs)) == ["s", "a", "b", "c", "d"]
    assert texts(conversation({"image": "a.jpg", "caption": "A cat."}))[1] == "A cat."


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"instruction": "Add.", "output": None}, "'output' is a NoneType, not text"),
        ({"query": "a", "response": "b", "history": [["a"]]}, "'history' is no list of [question, answer]"),
        ({"query": "a", "response": "b", "instruction": "c", "output": "d"}, "turns under several keys"),
        ({"messages": [], "conversations": [], "id": "x"}, "turns under several keys: conversations, messages"),
        ({"conversation": [{"human": "a", "assistant": "b", "image": "c"}]}, "exchange 1: key 'image'"),
        ({"image": "a.jpg", "caption": "A", "text": "B"}, "two captions: caption and text differ"),
        ({"caption": "A cat."}, "a caption without an image"),
        ({"prompt": "a", "completion": "b"}, "no field 'conversations'"),
        ({}, "there are no fields"),
        ([], "record is a JSON list"),
        ({**asks("q"), "caption": "A cat."}, "key 'caption' is not understood"),
    ],
)
def test_turns_that_are_not_understood(record, why):
    assert why in reason(record)


@pytest.mark.parametrize("answer", ["", " \n\u00a0 ", "\u200b", "\t\r\n", "\ufeff"])
def test_an_empty_answer_is_nothing_to_learn(answer):
    assert reason(asks("q", answer)) == "nothing to learn: turn 2, from gpt/assistant, is empty"
    later = says(("human", "q"), ("gpt", "a"), ("human", "q"), ("gpt", answer))
    assert reason(later) == "nothing to learn: turn 4, from gpt/assistant, is empty"
    parts = [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    assert reason({"messages": parts}).startswith("nothing to learn")
    later["conversations"][3]["loss"] = False  # as context it teaches nothing
    assert len(conversation(later).turns) == 4
