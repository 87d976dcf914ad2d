"""Which task a question sets, and in which format it is answered: what formats are unified and held together by."""

import re
from typing import Literal, get_args

from megatron_eagle.curation.questions import (
    NUMBER_WORDS,
    asks_count,
    asks_yes_no,
    chosen_letter,
    normal,
    options_of,
    works_on_text,
)

Task = Literal["choice", "yes_no", "boxes", "table", "ocr", "caption", "reasoning", "number", "short", "open"]
TASKS: tuple[Task, ...] = get_args(Task)
SHORT, LETTERS = 3, 40  # words and characters of a short answer at the most

_BOXES = re.compile(r"\b(?:bounding box|box of|coordinates|locate|detect|localize|localise|ground)\b", re.I)
_TABLE = re.compile(r"\b(?:table|markdown|extract the data|csv)\b", re.I)
_CAPTION = re.compile(
    r"\b(?:describe|description|caption|what do you see|what is happening|summari[sz]e the image)\b", re.I
)
_REASONING = re.compile(r"\b(?:step by step|explain|solve|prove|derive|reason|show your work|why)\b", re.I)
_NUMBERS = re.compile(r"(?:[\[(<]|<box>)[\[(\s]*-?\d[\d.\s]*,[\d.,\s\-\[\]()]*(?:[\])>]|</box>)")
_ONE_NUMBER = re.compile(r"[-+]?[$€£]?\d[\d,]*(?:\.\d+)?\s*%?\.?")


def task_of(question: str, answer: str) -> Task:
    """The task, from the question first and the answer where the words leave it open."""
    if options_of(question):
        return "choice"
    if asks_yes_no(question):
        return "yes_no"
    if _BOXES.search(question) and _NUMBERS.search(answer):
        return "boxes"
    if _TABLE.search(question) and sum(line.count("|") >= 2 for line in answer.splitlines()) >= 2:
        return "table"
    if works_on_text(question):
        return "ocr"
    if _CAPTION.search(question):
        return "caption"
    if asks_count(question) or _ONE_NUMBER.fullmatch(answer.strip()):
        return "number"
    if _REASONING.search(question):
        return "reasoning"
    return "short" if len(answer.split()) <= SHORT and len(answer) <= LETTERS else "open"


def format_of(task: Task, question: str, answer: str) -> str:
    """How an answer to a task is written, in a word or two; "sentence" where it is more than the bare answer."""
    said = answer.strip()
    if task == "choice":
        options = options_of(question)
        letter = chosen_letter(said, options)
        alone = letter is not None and normal(said) == letter.lower()
        texts = [normal(text) for text in options.values()]
        if alone:
            return "letter"
        return (
            "text"
            if normal(said) in texts
            else "letter and text"
            if letter and normal(said)[2:] in texts
            else "sentence"
        )
    if task == "yes_no":
        bare = normal(said)
        return said if bare in ("yes", "no") and len(said) <= 4 else "sentence"
    if task == "number":
        return "digits" if _ONE_NUMBER.fullmatch(said) else "words" if normal(said) in NUMBER_WORDS else "sentence"
    if task == "boxes":
        start = re.match(r"<\w+>|[\[(]+", said)
        return f"{start[0] if start else 'sentence'}, {'shares' if '.' in said else 'pixels'}"
    if task == "short":
        return "with a full stop" if said.endswith(".") else "without a full stop"
    return "text"
