"""What is left of a conversation when an answer goes: questions, markers, media."""

from pathlib import Path

import pytest

from megatron_eagle.curation.sample import Finding, Sample, apply_findings, without_exchanges
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.sample.conversation import Conversation, Turn

SLICES = tuple(FileSlice(Path(f"/{name}.png"), 0, 1) for name in "abc")


def talk() -> Sample:
    turns = (
        Turn("system", "Be kind."),
        Turn("user", "<image>\nFirst?"),
        Turn("assistant", "One."),
        Turn("user", "Second, \\<image> in words, <image>?"),
        Turn("assistant", "Two."),
        Turn("user", "<image>Third?"),
        Turn("assistant", "Three."),
    )
    return Sample(
        "s", "general", 4, Conversation("x", ("a.png", "b.png", "c.png"), turns), SLICES, (), {"tasks": ["a"]}
    )


def texts(sample: Sample | None) -> list[str]:
    assert sample is not None
    return [turn.text for turn in sample.conversation.turns]


def test_exchanges_have_no_markers_but_words_that_look_like_them() -> None:
    first, second, third = talk().exchanges
    assert (first.question, first.answer, first.turn, first.media) == ("First?", "One.", 3, 1)
    assert second.question == "Second, <image> in words, ?"
    assert third.history.splitlines()[:3] == ["Be kind.", "First?", "One."]


def test_media_of_a_question_that_goes_are_shown_in_the_next_one() -> None:
    left = without_exchanges(talk(), {3})
    assert texts(left)[1].splitlines() == ["<image>", "Second, \\<image> in words, <image>?"]
    assert left is not None and left.images == SLICES


def test_media_that_nothing_follows_go() -> None:
    left = without_exchanges(talk(), {5, 7})
    assert texts(left) == ["Be kind.", "<image>\nFirst?", "One."]
    assert left is not None and left.images == SLICES[:1] and left.conversation.images == ("a.png",)


def test_nothing_is_left_without_answers() -> None:
    assert without_exchanges(talk(), {3, 5, 7}) is None


def test_a_sample_goes_whole_where_the_plan_says_so() -> None:
    faulty = [Finding("rejected", "bad", turn=5)]
    assert apply_findings(talk(), faulty, "rule", "sample") is None
    assert len(texts(apply_findings(talk(), faulty, "rule", "exchange"))) == 5


def test_a_change_is_applied_and_notes_are_kept() -> None:
    changed = apply_findings(
        talk(), [Finding("changed", "r", turn=3, text="1"), Finding("noted", "", note=7)], "op", "exchange"
    )
    assert texts(changed)[2] == "1"
    assert changed is not None and changed.notes == {"tasks": ["a"], "op": 7}


def test_a_change_needs_a_turn_and_a_text() -> None:
    with pytest.raises(ValueError, match="turn=None"):
        Finding("changed", "r", text="1")


def test_plain_data_and_back() -> None:
    assert Sample.from_json(talk().to_json(), "s", "general") == talk()
