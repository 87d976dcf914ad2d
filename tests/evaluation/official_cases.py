"""Answers to be scored, drawn from a fixed seed: what the rules are compared on with the official code.

Words, numbers and signs are drawn so that all branches of the rules are taken: near misses, percentages, letters in all
the ways models write them, whole sentences. The same seed gives the same cases in every Python (``random.Random``'s
``random`` and ``choice`` do not change); a digest of them stands beside the recorded answers.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

COUNT = 5000
Case = list[Any]

WORDS = [
    "the",
    "a",
    "an",
    "The",
    "red",
    "car",
    "cat",
    "London",
    "USA",
    "yes",
    "no",
    "Yes",
    "NO",
    "maybe",
    "three",
    "two",
    "ten",
    "none",
    "zero",
    "dog's",
    "it's",
    "dont",
    "isnt",
    "shes",
    "Id've",
    "somebody'd",
    "oclock",
    "couldnt've",
    "1,000",
    "2.5",
    "3.14",
    "-7",
    "0",
    "12",
    "100",
    "50%",
    "4%",
    "1e3",
    "10.50",
    "café",
    "Straße",
    "ÉTÉ",
    "answer",
    "is",
    "final",
    "so",
    "therefore",
    "result",
    "could",
    "be",
    "x=5",
    "e.g.",
    "U.S.A.",
    "well-known",
    "and/or",
    "(maybe)",
    "[box]",
    '"quoted"',
    "Mr.",
    "3rd",
    "$5",
    "end",
]
SIGNS = ("", "", "", ".", ",", "!", "?", ";", ":", "'", '"', "\n", "\t", " . ", "...", "()", "-")
LETTERS = "ABCDEF"
OPTION_TEXTS = ("a cat", "the dog", "London", "5", "12", "A", "red", "None", "dog", "Both", "x", "", "2.5 km", "cat")
CATEGORIES = ("Regular Text Recognition", "Doc-oriented VQA", "Handwritten Mathematical Expression Recognition")


def text(draw: Random, most: int = 8) -> str:
    """Some words with signs after them, sometimes without a space between, sometimes none at all."""
    parts = []
    for _ in range(int(draw.random() * (most + 1))):
        parts.append(draw.choice(WORDS) + draw.choice(SIGNS) + (" " if draw.random() < 0.9 else ""))
    return "".join(parts)


def number(draw: Random) -> str:
    value = draw.choice((0, 1, 5, 100, 0.05, 12.5, -3, 1234, 99.9)) * draw.choice((1, 1, 1.04, 1.05, 1.06, 0.95, 10))
    form = draw.choice(("{}", "{:.2f}", "{}%", " {}", "{:.0f}", "{:,.0f}", "{:e}", "{} "))
    return form.format(value)


def near(draw: Random, word: str) -> str:
    """``word`` with a few changes, often none."""
    for _ in range(int(draw.random() * 4)):
        place = int(draw.random() * (len(word) + 1))
        change = draw.choice(("", draw.choice("abcXYZ 1.é"), " ", "  "))
        word = word[:place] + change + word[place + (draw.random() < 0.5) :]
    return draw.choice((word, word.upper(), word.lower(), word))


def texts(draw: Random, least: int, most: int) -> list[str]:
    return [text(draw, 3) for _ in range(least + int(draw.random() * (most - least + 1)))]


def anls(draw: Random) -> Case:
    references = [one or "x" for one in texts(draw, 1, 3)]
    return [draw.choice((text(draw), near(draw, draw.choice(references)))), references]


def relaxed(draw: Random) -> Case:
    reference = draw.choice((number(draw), text(draw, 2), number(draw)))
    answer = draw.choice((near(draw, reference), number(draw), reference, text(draw, 3), "nan", "inf"))
    return [answer.strip(), [reference]]


def vqa(draw: Random) -> Case:
    few = [text(draw, 3) for _ in range(3)]
    return [draw.choice((*few, near(draw, few[0]), text(draw))), [draw.choice(few) for _ in range(10)]]


def containment(draw: Random) -> Case:
    references = texts(draw, 1, 2)
    around = (text(draw, 3), near(draw, draw.choice(references)), text(draw, 3))
    return [draw.choice(("".join(around), text(draw), "ＡＢＣ " + around[1])), references, draw.choice(CATEGORIES)]


def options(draw: Random) -> dict[str, str]:
    letters = LETTERS[: 2 + int(draw.random() * 5)]
    return {letter: draw.choice(OPTION_TEXTS) for letter in letters}


def choice_answer(draw: Random, given: dict[str, str]) -> str:
    letter = draw.choice((*LETTERS, "Z", "G", "a"))
    form = draw.choice((
        "{0}", "{0}.", "({0})", "{0}) {1}", "The answer is {0}", "The correct answer is **{0}**. Here is why: {2}",
        "{1}", "It is {1}.", "{2} {0}", "{0} {2}", "{0} and B", "answer is {0} {2}", "{2}{1}", "Option {0}: {1}",
        "I'm sorry, but without the image provided I cannot", "Failed to obtain answer via API.", "", "{2}",
        "A {2} ({0})", "{0}\n{1}", "*{0}*", "[{0}]", "#{0}!", "Cannot determine the answer {0}",
    ))  # fmt: skip
    return form.format(letter, draw.choice(tuple(given.values())), text(draw))


def multiple_choice(draw: Random) -> Case:
    given = options(draw)
    return [choice_answer(draw, given), given]


def circular(draw: Random) -> Case:
    """Rows of three questions, each with up to four rotations: index, options, right letter, answer."""
    rows = []
    for question in (1, 2, 3):
        for turn in range(1 + int(draw.random() * 4)):
            given = options(draw)
            right = draw.choice(tuple(given))
            answer = right if draw.random() < 0.85 else choice_answer(draw, given)
            rows.append([question + 1_000_000 * turn, given, right, answer])
    return [rows]


def yes_no(draw: Random) -> Case:
    word = draw.choice(("yes", "no", "Yes", "No", "YES", "nothing", "yes/no", "yes-no", "know", "no,", "1,000 yes"))
    return [draw.choice((word, word + draw.choice(SIGNS), text(draw) + word, word + " " + text(draw), text(draw)))]


def hallusion(draw: Random) -> Case:
    """Rows of a file: index, subcategory, right or not."""
    rows = []
    for _ in range(2 + int(draw.random() * 12)):
        names = [draw.choice("0123") for _ in range(3)]
        kind = draw.choice(("figure", "map", "table"))
        rows.append(["_".join(["VD", kind, "0", *names]), kind, draw.random() < 0.7])
    return [rows]


def mmmu_option(draw: Random) -> Case:
    given = options(draw)
    return [choice_answer(draw, given), given]


def mmmu_open(draw: Random) -> Case:
    references = [
        draw.choice((number(draw).strip(), draw.choice(WORDS), text(draw, 2).strip() or "x")) for _ in range(2)
    ]
    said = draw.choice((references[0], number(draw), near(draw, references[0])))
    form = draw.choice((
        "{0}", "The answer is {0}.", "{1} so the result is {0}", "{1}\n{1} = {0}", "{0}\n{1}", "{1} {0} {1}",
        "so {0}.\n",
        "final answer {0}, therefore {1}",
    ))  # fmt: skip
    return [form.format(said, text(draw)), references]


def box(draw: Random) -> list[float]:
    left, top = draw.random(), draw.random()
    return [round(value, 3) for value in (left, top, left + draw.random() + 0.01, top + draw.random() + 0.01)]


def boxes(draw: Random) -> Case:
    said = draw.choice((str(box(draw)), f"<box>[{box(draw)}]</box>", f"It is at {box(draw)} {text(draw, 2)}",
                        text(draw), "[1, 2, 3]", "[ 0.1,0.2 , 0.3,0.4 ]", "[0.1, 0.2, 0.9, 1]"))  # fmt: skip
    return [said, box(draw)]


def clock(draw: Random) -> str:
    seconds = int(draw.random() * 4000)
    return draw.choice((
        f"{seconds // 60 % 60}:{seconds % 60:02d}", f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}",
        str(seconds), f"{draw.random() * 60:.1f}", f"{draw.random() * 60:.1f}s", f"{draw.random() * 60:.1f} seconds",
    ))  # fmt: skip


def spans(draw: Random) -> Case:
    form = draw.choice((
        "{0} - {1}", "The given query happens in {0} - {1} seconds.", "{0} to {1}", "from {0} to {1}", "{0}–{1}",
        "Starting time: {0}\nEnding time: {1}", "It starts at {0} and ends at {1}.", "{2} {0}! It ends at {1}",
        "{0}", "{2}", "A specific example is : 20.8 - 30.0 seconds {0} - {1}", "start {0}. end {1}", "{0}\n{1}\n{0}",
        "It starts at {0}\nIt ends at {1}\n{2}", "Between {0} s and {1} s", "{1} - {0}", "{0}-{0}",
    ))  # fmt: skip
    start = round(draw.random() * 30, 1)
    return [form.format(clock(draw), clock(draw), text(draw)), [start, round(start + draw.random() * 20, 1)]]


def mathvista(draw: Random) -> Case:
    """extraction, reference, type of answer, options"""
    kind = draw.choice(("integer", "float", "choice"))
    if kind == "choice":
        given = options(draw)
        return [choice_answer(draw, given), draw.choice(tuple(given)), "text", given]
    reference = str(int(draw.random() * 20)) if kind == "integer" else f"{draw.random() * 5:.1f}"
    answer = draw.choice(
        (reference, str(int(draw.random() * 20)), f"{draw.random() * 5:.1f}", text(draw), number(draw))
    )
    return [answer, reference, kind, {}]


GENERATORS: dict[str, Callable[[Random], Case]] = {
    function.__name__: function
    for function in (
        anls, relaxed, vqa, containment, multiple_choice, circular, yes_no, hallusion, mmmu_option, mmmu_open, boxes,
        spans, mathvista,
    )
}  # fmt: skip


def cases(name: str, count: int = COUNT) -> Iterator[Case]:
    """The first ``count`` cases for the rule ``name``."""
    draw = Random(f"megatron-eagle {name}")
    return (GENERATORS[name](draw) for _ in range(count))


def digest(name: str) -> str:
    """SHA-256 of all cases of a rule."""
    found = hashlib.sha256()
    for case in cases(name):
        found.update(json.dumps(case).encode())
    return found.hexdigest()
