"""What the demo asks and what the right answer is: wordings, and conversations about scenes or about plain text.

Each kind of question has wordings for training and others for the held-out split. The held-out ones use words that
training has seen, in sentences that it has not: a model of a million weights cannot know a word it never met, but it
has to understand the question rather than recognise the sentence.

Questions of one conversation never give each other's answers away, so that every turn must be answered by looking.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eagle.demo.drawing import COLOURS, ChartScene, CountScene, PrintScene, Scene, ShapeScene


@dataclass(frozen=True)
class Wordings:
    """The ways to ask one thing; ``{}`` fields are filled by the caller."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    def pick(self, split: str, rng: random.Random) -> str:
        return rng.choice(self.train if split == "train" else self.heldout)


Turn = tuple[str, str]
"""(question, answer)"""

WORDS = (
    "apple", "bird", "box", "cat", "dog", "fish", "house", "jam", "key", "lamp", "moon", "owl", "queen", "snow", "tree",
    "van",
)  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("day", "night"), ("up", "down"), ("fast", "slow"), ("old", "new"),
    ("full", "empty"), ("open", "shut"), ("dry", "wet"), ("long", "short"),
)  # fmt: skip

ASK = {
    "shape": Wordings(
        (
            "What shape is this?",
            "Which shape do you see?",
            "Name the shape.",
            "Tell me the shape in the image.",
            "The image shows which shape?",
            "What is the shape?",
            "Tell me what the shape is.",
            "Please name the shape.",
        ),
        ("Which shape is this?", "Tell me what shape you see.", "Name the shape in the image."),
    ),
    "shape_colour": Wordings(
        (
            "What colour is the shape?",
            "Which colour do you see?",
            "Name the colour.",
            "Tell me the colour of the shape.",
            "The shape has which colour?",
            "What is the colour in the image?",
            "Tell me what the colour is.",
        ),
        ("Which colour is the shape?", "Tell me what colour you see.", "Name the colour of the shape."),
    ),
    "word": Wordings(
        (
            "What word is this?",
            "Which word do you see?",
            "Read the word.",
            "Tell me the word in the image.",
            "The image shows which word?",
            "What is the word?",
            "Tell me what the word is.",
        ),
        ("Which word is this?", "Tell me what word you see.", "Read the word in the image."),
    ),
    "number": Wordings(
        (
            "What number is this?",
            "Which number do you see?",
            "Read the number.",
            "Tell me the number in the image.",
            "The image shows which number?",
            "What is the number?",
            "Tell me what the number is.",
        ),
        ("Which number is this?", "Tell me what number you see.", "Read the number in the image."),
    ),
    "ink": Wordings(
        (
            "What colour is the ink?",
            "Which colour has the ink?",
            "Name the colour of the ink.",
            "Tell me the ink colour.",
            "The ink has which colour?",
        ),
        ("Which colour is the ink?", "Tell me what colour the ink has.", "Name the ink colour."),
    ),
    "count": Wordings(
        (
            "How many dots are there?",
            "Count the dots.",
            "How many dots do you see?",
            "Tell me how many there are.",
            "The image shows how many dots?",
            "How many are in the image?",
        ),
        ("How many are there?", "Count the dots in the image.", "Tell me how many dots you see."),
    ),
    "count_colour": Wordings(
        (
            "What colour are the dots?",
            "Which colour are they?",
            "Name the colour of the dots.",
            "Tell me the colour they have.",
        ),
        ("Tell me which colour the dots are.", "What colour do the dots have?"),
    ),
    "tallest": Wordings(
        (
            "Which bar is the tallest?",
            "What colour is the tallest bar?",
            "Name the tallest bar.",
            "Tell me the tallest bar.",
            "The tallest bar has which colour?",
        ),
        (
            "Which colour is the tallest bar?",
            "Tell me which bar is the tallest.",
            "Name the colour of the tallest bar.",
        ),
    ),
    "first_bar": Wordings(
        (
            "Which bar is the first?",
            "What colour is the first bar?",
            "Name the first bar.",
            "Tell me the first bar.",
            "The first bar has which colour?",
        ),
        ("Which colour is the first bar?", "Tell me which bar is the first.", "Name the colour of the first bar."),
    ),
    "bars": Wordings(
        ("How many bars are there?", "Count the bars.", "How many bars do you see?", "The image shows how many bars?"),
        ("Tell me how many bars there are.", "Count the bars in the image."),
    ),
    "same_colour": Wordings(
        (
            "Do the two images have the same colour?",
            "Is the colour the same?",
            "Tell me if the colour is the same.",
            "Are both shapes the same colour?",
            "Is it the same colour in both images?",
        ),
        ("Do both shapes have the same colour?", "Is the colour of the two images the same?"),
    ),
    "same_shape": Wordings(
        (
            "Do the two images have the same shape?",
            "Is the shape the same?",
            "Tell me if the shape is the same.",
            "Are both the same shape?",
            "Is it the same shape in both images?",
        ),
        ("Do both images have the same shape?", "Is the shape of the two images the same?"),
    ),
    "colour_of": Wordings(
        (
            "What colour is the shape in the {} image?",
            "Which colour has the {} image?",
            "Name the colour of the {} image.",
            "Tell me the colour in the {} image.",
            "The {} image has which colour?",
        ),
        (
            "What colour has the {} image?",
            "Tell me which colour you see in the {} image.",
            "Name the colour of the shape in the {} image.",
        ),
    ),
    "shape_of": Wordings(
        (
            "What shape is in the {} image?",
            "Which shape has the {} image?",
            "Name the shape of the {} image.",
            "Tell me the shape in the {} image.",
            "The {} image has which shape?",
        ),
        (
            "What shape has the {} image?",
            "Tell me which shape you see in the {} image.",
            "Name the shape in the {} image.",
        ),
    ),
    "lookup": Wordings(
        (
            "What colour is the {}?",
            "Which colour has the {}?",
            "Name the colour of the {}.",
            "The {} has which colour?",
            "Tell me the colour of the {}.",
        ),
        ("Which colour is the {}?", "Tell me what colour the {} has."),
    ),
    "copy": Wordings(
        (
            'Say the word "{}".',
            'Write "{}".',
            'Please say "{}".',
            'Read this word: "{}".',
            'Please write the word "{}".',
        ),
        ('Please say the word "{}".', 'Write the word "{}".', 'Write this word: "{}".'),
    ),
    "opposite": Wordings(
        (
            'What is the opposite of "{}"?',
            'Name the opposite of "{}".',
            'Tell me the opposite of "{}".',
            'Which word is the opposite of "{}"?',
            'Say the opposite of "{}".',
        ),
        ('What word is the opposite of "{}"?', 'Please name the opposite of "{}".', 'Please say the opposite of "{}".'),
    ),
}


def scene_turns(scene: Scene, task: str, split: str, side_share: float, rng: random.Random) -> list[Turn]:
    """Questions about one picture, in an order drawn by lot: its main question and, each with chance ``side_share``,
    the side questions (mostly colours, which are learnt long before the rest)."""
    match scene:
        case ShapeScene(shape, colour):
            main, side = ("shape", shape), {"shape_colour": colour}
        case CountScene(colour, count):
            main, side = ("count", str(count)), {"count_colour": colour}
        case PrintScene(text, colour):
            main, side = (task, text), {"ink": colour}
        case ChartScene(bars):
            tallest = max(bars, key=lambda bar: bar[1])
            main, side = ("tallest", tallest[0]), {"first_bar": bars[0][0], "bars": str(len(bars))}
    asked = [main, *(item for item in side.items() if rng.random() < side_share)]
    turns = [(ASK[kind].pick(split, rng), answer) for kind, answer in asked]
    return rng.sample(turns, len(turns))


def comparison_turns(first: ShapeScene, second: ShapeScene, split: str, rng: random.Random) -> list[Turn]:
    """Questions about two pictures; never colour or shape both compared and told."""
    place, told = rng.choice((("first", first), ("second", second)))
    compare_shape = (ASK["same_shape"].pick(split, rng), "yes" if first.shape == second.shape else "no")
    compare_colour = (ASK["same_colour"].pick(split, rng), "yes" if first.colour == second.colour else "no")
    tell_shape = (ASK["shape_of"].pick(split, rng).format(place), told.shape)
    tell_colour = (ASK["colour_of"].pick(split, rng).format(place), told.colour)
    turns = list(rng.choice(((compare_shape, tell_colour), (compare_colour, tell_shape), (tell_shape, tell_colour))))
    return rng.sample(turns, len(turns))


def text_turns(split: str, rng: random.Random) -> list[Turn]:
    """A conversation without any picture: look something up in the text, repeat a word, name an opposite."""
    (thing, other), colour = rng.sample(WORDS, 2), rng.choice(sorted(COLOURS))
    facts = (f"The {thing} is {colour}.", f"The {other} is {rng.choice(('big', 'small', 'old', 'new'))}.")
    story = " ".join(rng.sample(facts, 2))
    lookup = (f"{story} {ASK['lookup'].pick(split, rng).format(thing)}", colour)
    word = rng.choice(WORDS)
    left, right = rng.sample(rng.choice(OPPOSITES), 2)
    others: Sequence[Turn] = (
        (ASK["copy"].pick(split, rng).format(word), word),
        (ASK["opposite"].pick(split, rng).format(left), right),
    )
    return rng.sample([lookup, *others], 3)
