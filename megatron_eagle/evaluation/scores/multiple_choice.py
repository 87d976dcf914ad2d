"""Which option an answer means: its letter, else the text of one option and no other.

Rule: VLMEvalKit's ``vlmeval/utils/matching_util.py`` (``can_infer``), without the judge that it asks next and without
the option it draws at random if that fails: an answer that means none is wrong.
Circular (MMBench): ``vlmeval/dataset/utils/multiple_choice.py``; a question counts if it is answered right with its
options in every order.
"""

import re
from collections.abc import Mapping

NONE_OF_THEM = "Z"
ROTATION = 1_000_000  # rows of one question have this between their indices

_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_SAID = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_NO_ANSWER = "Failed to obtain answer via API"
_LAST_WORDS = 5  # a letter counts among the last this many words


def chosen_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that ``answer`` means, ``Z`` if it says none of them, None if that cannot be told."""
    return _letter(answer, options) or _by_text(answer.lower(), options)


def _letter(answer: str, options: Mapping[str, str]) -> str | None:
    if _NO_ANSWER in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return NONE_OF_THEM
    words = answer.translate(_SEPARATORS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - _LAST_WORDS:
        return letters[0]
    if not letters and NONE_OF_THEM in words:
        return NONE_OF_THEM
    said = _SAID.search(answer)
    return said[1].upper() if said and said[1].upper() in options else None


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return None
    found = [letter for letter, text in options.items() if text.lower() in answer]
    return found[0] if len(found) == 1 else None


def question_of_rotation(index: int) -> int:
    """The index of the question that row ``index`` asks with its options in another order."""
    return index % ROTATION


def circular_accuracy(verdicts: Mapping[int, bool]) -> dict[int, bool]:
    """Whether each question is right in all its rows. verdicts: by the row's index."""
    whole: dict[int, bool] = {}
    for index, right in verdicts.items():
        question = question_of_rotation(index)
        whole[question] = whole.get(question, True) and right
    return whole
