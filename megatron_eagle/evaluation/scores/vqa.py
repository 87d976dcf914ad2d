"""VQA accuracy, for TextVQA: how many of ten people gave the answer.

Rule: arXiv 1505.00468 with each person left out in turn, as lmms-eval's ``tasks/textvqa/utils.py`` has it, on words as
EvalAI reads them (facebookresearch/mmf, ``pythia/tasks/processors.py``, which lmms-eval carries): lower case, without
articles and most punctuation, numbers up to ten as digits, apostrophes where they belong. Its slips are kept, since
they are part of the published numbers: 's is a word of its own, and the 33rd full stop stays.
"""

import re
from collections.abc import Sequence

AGREEING = 3  # as many others as make an answer wholly right

_ARTICLES = ("a", "an", "the")
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'  # commas and question marks are gone before
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32  # the official code hands re.UNICODE to sub's count

# Words with apostrophes; what lacks one of them is read as if it had it.
_CONTRACTED = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "might've",
    "mightn't",
    "mightn't've",
    "must've",
    "mustn't",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "'ow's'at",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'd've",
    "y'all'll",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTED for place, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round, as in the official table


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The mean, over those who gave ``references`` (two at least), of min(1, others who agree with ``answer`` / 3)."""
    said = normalise(answer)
    agrees = [normalise(reference) == said for reference in references]
    others = (sum(agrees) - agree for agree in agrees)
    return sum(min(1.0, count / AGREEING) for count in others) / len(agrees)


def normalise(text: str) -> str:
    """``text`` as EvalAI reads it."""
    plain = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    plain = _without_punctuation(plain.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    plain = text
    for sign in _PUNCTUATION:
        plain = plain.replace(sign, "" if f"{sign} " in text or f" {sign}" in text else " ")
    return _FULL_STOP.sub("", plain, _FULL_STOPS)
