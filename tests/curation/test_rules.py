"""Rules against planted faults, and against clean data: what they find, and what they must leave alone."""

from pathlib import Path

import pytest
from planted import KINDS, write_planted
from rule_table import FINDS, flagged, read_samples, recalls, scores

from megatron_eagle.curation.operator import SampleOperator, make_operator, operator_names
from megatron_eagle.curation.sample import Sample
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.sample.conversation import Conversation, Turn
from megatron_eagle.demo.dataset import generate

LEAST = 0.95


def check_rules(folder: Path, samples: int, seed: int) -> None:
    planted = write_planted(folder, samples, seed=seed)
    found = flagged(folder / "samples.jsonl")
    assert set(planted.values()) == {None, *KINDS}
    assert {rule: score.precision for rule, score in scores(planted, found).items() if score.precision < LEAST} == {}
    assert {kind: counts for kind, counts in recalls(planted, found).items() if counts[1] < LEAST * counts[0]} == {}
    assert all(found[rule] for rule in FINDS)


def check_clean(folder: Path, samples: int) -> None:
    generate(folder, split="train", samples=samples, seed=3)
    found = flagged(folder / "samples.jsonl")
    assert {rule: sorted(names)[:3] for rule, names in found.items() if names} == {}


@pytest.mark.slow
def test_rules_find_planted_faults(tmp_path: Path) -> None:
    check_rules(tmp_path, 3000, seed=2)


@pytest.mark.long
def test_rules_find_planted_faults_in_twenty_thousand_conversations(tmp_path: Path) -> None:
    check_rules(tmp_path, 20_000, seed=7)


@pytest.mark.slow
def test_rules_leave_the_embedded_data_alone(tmp_path: Path) -> None:
    check_clean(tmp_path, 300)


@pytest.mark.long
def test_rules_leave_two_thousand_of_the_embedded_data_alone(tmp_path: Path) -> None:
    check_clean(tmp_path, 2000)


def sample(*turns: tuple[str, str], images: int = 0) -> Sample:
    roles = {"q": "user", "a": "assistant", "s": "system"}
    conversation = Conversation(
        "one",
        tuple(f"{number}.png" for number in range(images)),
        tuple(Turn(roles[role], text) for role, text in turns),
    )
    return Sample("source", "general", 0, conversation, tuple(FileSlice(Path("x"), n, 1) for n in range(images)))


def reasons(rule: str, question: str, answer: str, **settings: object) -> list[str]:
    operator = make_operator(rule, dict(settings))
    assert isinstance(operator, SampleOperator)
    return [one.reason for one in operator.findings(sample(("q", question), ("a", answer)))]


@pytest.mark.parametrize(
    ("rule", "question", "answer", "settings", "found"),
    [
        ("repetition", "Go on.", "word word word word word", {}, True),
        ("repetition", "Go on.", "word word word word word", {"in_a_row": 5}, False),
        ("repetition", "Go on.", "a b a b a b a b a", {"longest": 1}, False),
        ("repetition", "Go on.", "1 1 1 1 1 1 1 1 1", {}, False),
        ("decimals", "How long is it?", "3.1415 cm", {}, True),
        ("decimals", "How long is it?", "3.141 cm", {}, False),
        ("decimals", "How long is it, to 4 decimal places?", "3.1415 cm", {}, False),
        ("decimals", "Given 0.1234, what is twice that?", "0.2468", {}, False),
        ("decimals", "Where is it?", "[0.12345, 0.23456]", {}, False),
        ("choices", "Which? A. cat B. dog", "C", {}, True),
        ("choices", "Which? A. cat B. dog", "A. dog", {}, True),
        ("choices", "Which? A. cat B. dog", "the dog", {}, False),
        ("choices", "Plan A. Or not?", "C", {}, False),
        ("yes_no", "Is it red?", "7", {}, True),
        ("yes_no", "Is it 7 or 8?", "7", {}, False),
        ("counting", "How many are there?", "three", {}, True),
        ("counting", "How many are there?", "Three, or 3", {}, False),
        ("counting", "How many dogs are there?", "None", {}, False),
        ("counting", "How many dogs are there?", "There are no dogs.", {}, False),
        ("counting", "How many dogs are there?", "No, three.", {}, True),
        ("yes_no", "What is the number of dogs? Is that clear?", "3", {}, False),
        ("yes_no", "Is it red? Is it new?", "3", {}, True),
        ("choices", "Which? A. red B. blue C. green", "Answer: I think it is blue, so B", {}, False),
        ("choices", "Which? A. red B. blue C. green", "I", {}, True),
        ("empty", "What is written on the box?", "None", {}, False),
        ("empty", "Which of the dogs is black?", "None", {}, False),
        ("empty", "Describe the image.", "None", {}, True),
        ("empty", "What is it?", "N/A", {}, True),
        ("empty", "What is it? If nothing, say N/A.", "N/A", {}, False),
        ("refusal", "What is it?", "I’m sorry, but I can’t help with that.", {}, True),
        ("refusal", "What is it?", "Sorry, can't help with that.", {}, True),
        ("refusal", "What is it?", "I'm sorry, but I'm unable to determine the species.", {}, True),
        ("refusal", "Tell.", "Unfortunately, he could not attend the event because of rain.", {}, False),
        ("refusal", "Write to Bob.", "I'm afraid we cannot meet on Monday.", {}, False),
        ("refusal", "Tell.", "Unfortunately, they do not have access to the beach.", {}, False),
        ("leak", "What colour is the red car?", "Red.", {}, True),
        ("leak", "Is the car red or blue?", "Red.", {}, False),
        ("leak", "What is it? Answer: yes or no.", "yes", {}, False),
        ("mentioned_images", "Describe the image.", "A dog.", {}, True),
        ("turn_order", "Hello.", "Hello.", {}, False),
    ],
)
def test_a_rule(rule: str, question: str, answer: str, settings: dict[str, object], found: bool) -> None:
    assert bool(reasons(rule, question, answer, **settings)) is found


def test_a_question_about_the_third_of_two_images() -> None:
    operator = make_operator("mentioned_images", {})
    assert isinstance(operator, SampleOperator)
    asked = sample(("q", "<image><image>What is in the third image?"), ("a", "A dog."), images=2)
    assert [one.detail for one in operator.findings(asked)] == ["image 3 of 2"]


def test_every_operator_says_what_it_is() -> None:
    from megatron_eagle.curation.operator import describe_operators

    lines = describe_operators()
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == list(operator_names())
    holding = [line.partition(":")[0] for line in lines if "bytes a sample" in line]
    assert {"contamination", "duplicates"} <= set(holding) and "decimals" not in holding


def test_samples_of_a_source_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"id": "a", "image": "no.png", "conversations": []}\n')
    refused: dict[str, str] = {}
    assert list(read_samples(tmp_path / "samples.jsonl", refused)) == []
    assert list(refused) == ["a"]
