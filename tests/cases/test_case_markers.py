r"""Marks in a text: Eagle's numbered ones are followed, lookalikes are refused beside media, ``\<image>`` is words."""

import pytest
from form_samples import asks, conversation, reason, says, texts
from hypothesis import given
from hypothesis import strategies as st
from samples import image_bytes, make_tokenizer, write_jsonl, write_video

from megatron_eagle.config.data import BlendSource, DataSettings
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.order.lengths import dataset_lengths
from megatron_eagle.data.order.measuring import open_sample_index
from megatron_eagle.data.sample.conversation import parse_record
from megatron_eagle.data.sample.markers import cut_at_markers, escape_marks, find_marks
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.data.stream.encode import tokenise

AB = ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("text", "images", "stored", "numbers", "shown"),
    [
        ("<image-1><image-2>\nCompare.", AB, AB, (), "<image><image>\nCompare."),
        ("<image-2> is second, <image-1> first.", AB, ["b.jpg", "a.jpg"], (2, 1), "<image> is second, <image> first."),
        ("<image-1> <image-1>?", ["a.jpg"], ["a.jpg", "a.jpg"], (1, 1), "<image> <image>?"),
        ("<image-2> then <image-2>", AB, ["a.jpg", "b.jpg", "b.jpg"], (1, 2, 2), "<image>\n<image> then <image>"),
        ("only <image-1>", "a.jpg", ["a.jpg"], (), "only <image>"),
        ("<image-02> <image-1>", AB, ["b.jpg", "a.jpg"], (2, 1), "<image> <image>"),
    ],
)
def test_numbered_markers_show_that_medium_there(text, images, stored, numbers, shown):
    made = conversation(asks(text, image=images))
    assert (list(made.images), made.image_numbers, texts(made)[0]) == (stored, numbers, shown)
    for kind in ("video",):
        film = conversation(asks(text.replace("image", kind), video=images))
        assert (list(film.videos), film.video_numbers) == (stored, numbers)


def test_numbers_run_over_all_turns_and_kinds():
    asked = (
        ("human", "<video-1> and <image-2>"),
        ("gpt", "Yes."),
        ("human", "And <image-1>, <video-1>?"),
        ("gpt", "No."),
    )
    made = conversation(says(*asked, image=AB, video="v.mp4"))
    assert made.images == ("b.jpg", "a.jpg") and made.videos == ("v.mp4", "v.mp4")
    assert (made.image_numbers, made.video_numbers) == ((2, 1), (1, 1))
    assert made.media == [("video", 0), ("image", 0), ("image", 1), ("video", 1)]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (asks("<image-3>", image=AB), "<image-3> is shown, but there are 2 images"),
        (asks("<image-0>", image=AB), "<image-0> is shown, but there are 2 images"),
        (asks("<image-1> <image>", image=AB), "<image> and <image-1> are mixed"),
        (asks("<image-1>"), "more <image> markers than images: 1 markers, 0 images"),
        (
            says(("human", "What?"), ("gpt", "<image-1>"), image="a.jpg"),
            "turn 2, from gpt/assistant, holds an <image-1>",
        ),
        (asks("Hm <video-1>", image="a.jpg"), "more <video> markers than videos"),
    ],
)
def test_numbers_that_lead_nowhere_are_refused(record, why):
    assert why in reason(record)


LOOKALIKES = [
    "<image1>", "<image 1>", "<image_1>", "<Image>", "<IMAGE>", "<Image-1>", "<image_placeholder>", "<ImageHere>",
    "<image_here>", "<VideoHere>", "<video1>", "<video 2>", "<Video>", "<|vision_start|>", "<|image_pad|>",
    "<|vision_end|>", "<|video_pad|>", "<|image|>", "<|image_1|>", "<IMG_CONTEXT>", "<img>", "<img_1>", "<IMG>",
    "<start_of_image>", "<image_soft_token>", "<im_start>", "<im_patch>", "<__media__>", "[IMG]", "[IMG_BREAK]",
    "<images>", "<image/>", "<image />", "< image >", "<picture 1>", "<frame_2>", "&lt;image&gt;", "<image:1>",
    "<vid1>", "<image_token>", "<video_token>", "<图片1>",
]  # fmt: skip


@pytest.mark.parametrize("mark", LOOKALIKES)
def test_lookalikes_are_refused_beside_media_and_can_be_escaped(mark):
    for record in (
        asks(f"Look: {mark} what is it?", image="a.jpg"),
        asks(f"<image>\nLook: {mark} what?", image="a.jpg"),
        says(("human", "<video>"), ("gpt", f"In {mark} I see it."), video="v.mp4"),
        says(("system", f"Watch {mark}"), ("human", "<image>"), ("gpt", "Yes."), image="a.jpg"),
    ):
        assert f"holds {mark}, which is no marker here" in reason(record)
    made = conversation(asks(f"<image>Look: \\{mark} what?", image="a.jpg"))
    assert cut_at_markers(made.turns[0].text, media=True) == ["", "<image>", f"Look: {mark} what?"]
    # Without media nothing could have been meant.
    assert texts(conversation(asks(f"Look: {mark} what?")))[0] == f"Look: {mark} what?"


@pytest.mark.parametrize(
    "text", ["<imagine>", "<video src='a'>", "</video>", "a <b> c", "<figure>", "<|im_end|>", "image 1", "<0>", "<ref>"]
)
def test_other_words_are_words(text):
    assert list(find_marks(text)) == []
    assert texts(conversation(asks(f"<image>{text}", image="a.jpg")))[0] == f"<image>{text}"


def test_escaped_markers_are_words():
    made = conversation(asks(r"<image>The \<video> tag", r"Write \<video> or \<image-1>.", image="a.jpg"))
    words = [cut_at_markers(turn.text, media=True) for turn in made.turns]
    assert words == [["", "<image>", "The <video> tag"], ["Write <video> or <image-1>."]]
    stored = parse_record(made.to_record(["0.jpg"]))
    assert stored.turns == made.turns and conversation(made.to_record(["0.jpg"])).turns == made.turns


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (r"a\<image>b", ["a<image>b"]),
        (r"a\\<image>b", ["a\\\\", "<image>", "b"]),
        (r"a\\\<image>b", [r"a\<image>b"]),
        (r"\<image><image>", ["<image>", "<image>", ""]),
        (r"a\b<image>", [r"a\b", "<image>", ""]),
    ],
)
def test_an_odd_number_of_backslashes_makes_words(text, pieces):
    assert cut_at_markers(text, media=False) == pieces


@given(st.lists(st.sampled_from(["<image>", "<video>", "<image-2>", "<Image>", "\\", "\\\\", "a", "\n", "<", ">"])))
def test_every_text_can_be_written(parts):
    assert cut_at_markers(escape_marks("".join(parts)), media=True) == ["".join(parts)]


def test_an_escaped_marker_does_not_move_the_picture():
    assert "is words, and no <image> says where" in reason(asks(r"See \<image> there", image="a.jpg"))


def test_html_without_an_escape_says_how_to_write_it():
    for record in (
        asks("How do I use the <video> tag?"),
        asks("Rewrite this page with a <video> element.", image="a.jpg"),
        asks("Code of this page?", "<body><video></video></body>", image="a.jpg"),
    ):
        assert r"(the word itself: \<video>)" in reason(record)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbered")
    for name, colour in (("a", "red"), ("b", "blue")):
        (folder / f"{name}.png").write_bytes(image_bytes((20, 20 if name == "a" else 40), colour))
        write_video(folder / f"{name}.mp4", 10 if name == "a" else 20)
    records = [
        asks("Compare. <image-2> is second, <image-1> first, <image-2>!", image=["a.png", "b.png"]) | {"id": "images"},
        asks("See <video-2>, <video-1>.", video=["a.mp4", "b.mp4"]) | {"id": "videos"},
        says(("human", "<image>"), ("gpt", "Wrong"), ("human", "No"), ("gpt", "Right"), image="a.png")
        | {"id": "plain"},
    ]
    records[2]["conversations"][1]["loss"] = False
    build_dataset(write_jsonl(folder, records), folder / "out")
    return folder


def test_the_model_sees_the_number_of_the_list(built, tmp_path):
    """As NVlabs/Eagle's data preparation writes it: ``<image 2>`` before the second of the list, wherever it is."""
    stored = {sample.conversation.id: sample for sample in iterate_samples(built / "out")}
    a, b = (built / "a.png").read_bytes(), (built / "b.png").read_bytes()
    assert stored["images"].images == (b, a, b)
    assert stored["images"].conversation.image_numbers == (2, 1, 2)
    tokenizer = make_tokenizer(tmp_path)
    planner = VisualPlanner(DataSettings(sources=(BlendSource("x"),), pack_length=4096, tile_size=28), tokenizer)

    def seen(name):
        return tokenizer.decode(tokenise(stored[name], planner)[0].tokens.tolist())

    places = [seen("images").index(words) for words in ("<image 2>", "is second", "<image 1>", "first")]
    assert places == sorted(places) and seen("images").count("<image 2>") == 2
    films = seen("videos")
    assert films.index("second video") < films.index("first video") and "2.00 seconds" in films.split("first video")[0]


def test_lengths_of_the_index_are_those_of_the_reader(built, tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    settings = DataSettings(sources=(BlendSource("x"),), pack_length=4096, tile_size=28)
    index = open_sample_index(built / "out")
    planner = VisualPlanner(settings, tokenizer)
    read = [len(tokenise(sample, planner)[0].tokens) for sample in iterate_samples(built / "out")]
    assert dataset_lengths(index, tokenizer, settings).tokens.tolist() == read
    assert index.video_numbers == {1: (2, 1)} == open_sample_index(built / "out").video_numbers


def test_what_was_built_is_built_again_the_same(built, tmp_path):
    build_dataset(built / "out", tmp_path / "again")
    for again, first in zip(iterate_samples(tmp_path / "again"), iterate_samples(built / "out"), strict=True):
        assert (again.conversation, again.images) == (first.conversation, first.images)
        assert [film.read() for film in again.videos] == [film.read() for film in first.videos]


def test_a_turn_that_is_not_learned_is_context(built, tmp_path):
    (plain,) = [s for s in iterate_samples(built / "out") if s.conversation.id == "plain"]
    tokenizer = make_tokenizer(tmp_path)
    planner = VisualPlanner(DataSettings(sources=(BlendSource("x"),), pack_length=4096, tile_size=28), tokenizer)
    segment = tokenise(plain, planner)[0]
    learned = segment.tokens[segment.labels >= 0].tolist()
    assert learned == [*tokenizer.encode("Right"), tokenizer.im_end]
    assert "Wrong" in tokenizer.decode(segment.tokens.tolist())
