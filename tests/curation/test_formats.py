"""Formats: tasks, bare answers, stated formats, decorations; and what is said of whole sources."""

from typing import Any

import pytest
from test_rules import sample

from megatron_eagle.curation.operator import SampleOperator, SetOperator, make_operator
from megatron_eagle.curation.operators.decorations import undecorated
from megatron_eagle.curation.sample import Sample
from megatron_eagle.curation.tasks import format_of, task_of

CHOICE = "Which? A. cat B. dog"


@pytest.mark.parametrize(
    ("question", "answer", "task", "form"),
    [
        (CHOICE, "B", "choice", "letter"),
        (CHOICE, "B. dog", "choice", "letter and text"),
        (CHOICE, "dog", "choice", "text"),
        ("Is it red?", "Yes", "yes_no", "Yes"),
        ("Is it red?", "Yes, it is.", "yes_no", "sentence"),
        ("How many?", "3", "number", "digits"),
        ("How many?", "three", "number", "words"),
        ("What is the value?", "$4.50", "number", "digits"),
        ("Locate the dog.", "[1, 2, 3, 4]", "boxes", "[, pixels"),
        ("Locate the dog.", "<box>[[0.1, 0.2, 0.3, 0.4]]</box>", "boxes", "<box>, shares"),
        ("Turn it into a table.", "| a | b |\n| 1 | 2 |", "table", "text"),
        ("Read the text.", "STOP", "ocr", "text"),
        ("Describe the image.", "A dog on a lawn.", "caption", "text"),
        ("Solve x + 1 = 2.", "x is 1, for 1 + 1 is 2.", "reasoning", "text"),
        ("What colour is it?", "red.", "short", "with a full stop"),
        ("What is it like there?", "It is a nice place.", "open", "text"),
    ],
)
def test_tasks_and_formats(question: str, answer: str, task: str, form: str) -> None:
    found = task_of(question, answer)
    assert (found, format_of(found, question, answer)) == (task, form)


def changed(operator_name: str, one: Sample) -> list[str]:
    operator = make_operator(operator_name, {})
    assert isinstance(operator, SampleOperator)
    ((_, _, after),) = operator.run([one])
    assert after is not None
    return [turn.text for turn in after.conversation.turns]


@pytest.mark.parametrize(
    ("question", "answer", "asked", "bare"),
    [
        (
            CHOICE,
            "The answer is (B).",
            f"{CHOICE}\nAnswer with the option's letter from the given choices directly.",
            "B",
        ),
        (CHOICE, "dog", f"{CHOICE}\nAnswer with the option's letter from the given choices directly.", "B"),
        (CHOICE, "Because it barks, it is B.", CHOICE, "Because it barks, it is B."),
        ("Is it?", "yes.", "Is it?\nAnswer yes or no.", "Yes"),
        ("Is it?", "Yes, it is.", "Is it?", "Yes, it is."),
        ("How many?", "There are three.", "How many?\nAnswer with a number.", "3"),
        ("How many? Answer with a number.", "3", "How many? Answer with a number.", "3"),
        ("Describe it.", "red.", "Describe it.", "red."),
    ],
)
def test_answers_are_unified_and_their_format_stated(question: str, answer: str, asked: str, bare: str) -> None:
    one = sample(("q", f"<image>\n{question}"), ("a", answer), images=1)
    assert changed("formats", one) == [f"<image>\n{asked}", bare]
    again = sample(("q", f"<image>\n{asked}"), ("a", bare), images=1)
    assert changed("formats", again) == [f"<image>\n{asked}", bare]


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("\\begin{align*}\n\\text{A dog on a lawn.}\n\\end{align*}", "A dog on a lawn."),
        ("\\begin{align*}\nx &= 1 + 2\n\\end{align*}", "\\begin{align*}\nx &= 1 + 2\n\\end{align*}"),
        ("The answer is $\\boxed{12}$.", "The answer is 12."),
        ("\\boxed{\\frac{1}{2}}", "$\\frac{1}{2}$"),
        ("**B**", "B"),
        ("**Bold** words stay.", "**Bold** words stay."),
        ("```\nred\n```", "red"),
        ("$12$", "12"),
        ("$x^2$", "$x^2$"),
        ("It costs $12 or $13.", "It costs $12 or $13."),
        ("Therefore $x=\\boxed{3}$.", "Therefore $x=3$."),
        ("$x=\\boxed{\\frac{1}{2}}$", "$x=\\frac{1}{2}$"),
        ("The cost is \\$\\boxed{5}", "The cost is \\$5"),
        ("It costs $5, with tax $\\boxed{6}$.", "It costs $5, with tax 6."),
        ("$x$", "$x$"),
        ("$AB$", "$AB$"),
        ("$5 and $", "$5 and $"),
        ("$red car$", "red car"),
        ("$\\alpha\\boxed{x}$", "$\\alpha x$"),
        ("\\[x = \\boxed{3}\\]", "\\[x = 3\\]"),
        ("\\boxed{$x=2$}", "$x=2$"),
        ("\\begin{align*}x &= \\boxed{\\frac12}\\end{align*}", "\\begin{align*}x &= \\frac12\\end{align*}"),
        ("$x = \\boxed{\\frac12}", "$x = \\boxed{\\frac12}"),
    ],
)
def test_decorations_come_off_words_and_stay_on_equations(answer: str, plain: str) -> None:
    assert undecorated(answer) == plain
    assert changed("decorations", sample(("q", "What?"), ("a", answer)))[1] == plain


def linted(answers: dict[str, list[str]], question: str, **settings: Any) -> dict[str, list[str]]:
    operator = make_operator("lint", {"least": 4, **settings})
    assert isinstance(operator, SetOperator)
    samples = [
        Sample(source, "general", number, sample(("q", question), ("a", answer)).conversation)
        for source, texts in answers.items()
        for number, answer in enumerate(texts)
    ]
    found: dict[str, list[str]] = {source: [] for source in answers}
    for verdict in operator.run(samples):
        assert verdict.key[1] is None
        found[verdict.key[0]].append(f"{verdict.finding.reason}: {verdict.finding.detail}")
    return found


def test_sources_that_contradict_each_other_are_named() -> None:
    found = linted({"a": ["A", "B", "A", "B"], "b": ["cat", "dog", "dog", "cat"], "c": ["A"]}, CHOICE)
    assert found["a"] == [
        "tasks: choice 4",
        "sources contradict each other: choice: 100% answered as 'letter', b as 'text'",
    ]
    assert found["b"][1] == "sources contradict each other: choice: 100% answered as 'text', a as 'letter'"
    assert found["c"] == ["tasks: choice 1"]


def test_a_template_that_dominates_is_named() -> None:
    answers = [f"\\begin{{align*}} {word} \\end{{align*}}" for word in ("a", "b", "c")] + [
        "It is " + "so very " * 4 + word for word in "xy"
    ]
    found = linted({"a": answers}, "Describe the image.")["a"]
    assert [line.rpartition(": ")[2] for line in found[1:]] == [
        "3 of 5 longer answers begin '\\\\begin{align*}'",
        "2 of 5 longer answers begin 'It is so very'",
    ]
