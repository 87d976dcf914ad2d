"""What a question asks for, read off its words: options, yes or no, a count, a text to be copied.

Plain patterns of English instructions as data sets write them. Where words leave it open the answer here is no, so that
a rule built on it rather misses a fault than removes what is right.
"""

import re
import string
from collections.abc import Collection
from decimal import Decimal

NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
_TOKEN = re.compile(
    r"((?:(?<![\w.,)-])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?)|[^\W\d_]+|(?<=\d)[:–-](?=\d)|(?<!\w)-(?=\S)"
    r"|[+/%°^=<>$€£#&]"
)
_OPTION = re.compile(r"(?:^|[\n\s])\(?([A-Z])(?:[.):]|\s-)\s*(?=\S)")
_LETTER_ALONE = re.compile(r"^\W*([A-Za-z])\W*$")
_LETTER_FIRST = re.compile(r"^\W*([A-Z])[.):]\s*(?=\S)")
_LETTER_SAID = re.compile(r"(?i:\b(?:answer|option|choice)\s*(?:is|:)?\s*(?:option\s*)?)\*{0,2}\(?([A-Z])\b(?!['’\w])")
_AUXILIARY = re.compile(
    r"(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|may|might|must|isn't|aren't|doesn't)\b",
    re.I,
)
_POLITE = re.compile(
    r"(?:(?:can|could|would|will) you\b(?! (?:see|find|spot) an?\b)"
    r"|do you (?:know|see|think)?\s*(?:how|what|which|who|when|where|why)\b)",
    re.I,
)
_COUNT = re.compile(
    r"\bhow many\b|\bcount (?:the|all|how)\b"
    r"|\b(?:what is|what's|tell me|give|state) the (?:total )?(?:number|count) of\b",
    re.I,
)
_TEXT_WORK = re.compile(
    r"\b(?:translat\w*|transcri\w*|ocr|repeat|say (?:the|this|exactly)|how do you say|spell\w*|copy|correct the"
    r"|proofread\w*|fix the|rewrite|rephrase|paraphrase|read (?:the|all|this|out|what)"
    r"|write (?:the|this|down) (?:word|sentence|text)|quote"
    r"|(?:text|word|words|sign|label|title|written|printed)\b[^.?!]{0,40}"
    r"\b(?:say|says|read|reads|written|in the image|shown))\b"
    r"|\bwhat (?:does|do) [^.?!]{0,40}\bsay\b|\bwhat is (?:written|printed)\b",
    re.I,
)


def options_of(question: str) -> dict[str, str]:
    """Letter -> text of the options a question lists, which begin with A and have no gaps; empty if it lists none."""
    found: list[tuple[str, int, int]] = []
    for match in _OPTION.finditer(question):
        if match[1] == string.ascii_uppercase[len(found)]:
            found.append((match[1], match.start(), match.end()))
    if len(found) < 2:
        return {}
    ends = [start for _, start, _ in found[1:]] + [len(question)]
    texts = [question[begin:end].strip() for (_, _, begin), end in zip(found, ends, strict=True)]
    texts[-1] = texts[-1].partition("\n")[0].strip()
    return {letter: text for (letter, _, _), text in zip(found, texts, strict=True)}


def chosen_letter(answer: str, options: Collection[str]) -> str | None:
    """The letter of an option that an answer names, the last if it says several; None if it names none.

    options: their letters; "I" within a sentence is a letter only if it is one of them.
    """
    for pattern in (_LETTER_ALONE, _LETTER_FIRST):
        if match := pattern.match(answer):
            return match[1].upper()
    said = [letter for letter in _LETTER_SAID.findall(answer) if letter != "I" or letter in options]
    return said[-1] if said else None


def asking_sentence(question: str) -> str:
    """The last sentence with a question mark, or the whole text."""
    return _asking_sentences(question)[-1]


def _asking_sentences(question: str) -> list[str]:
    sentences = re.split(r"(?<=[.?!])\s+|\n+", question.strip())
    return [sentence for sentence in sentences if sentence.rstrip("\"')").endswith("?")] or [question.strip()]


def asks_yes_no(question: str) -> bool:
    """Whether yes or no is wanted; alternatives ("is it black or white?") and polite requests want something else.

    So does a question that is followed by another ("How much is it? Is that clear?").
    """
    if options_of(question):
        return False
    if re.search(r"\byes\b\W+(?:or|/)?\W*no\b", question, re.I):
        return True
    return not asks_count(question) and all(
        sentence.endswith("?")
        and _AUXILIARY.match(sentence)
        and not _POLITE.match(sentence)
        and not re.search(r"\bor\b", sentence, re.I)
        for sentence in _asking_sentences(question)
    )


def asks_count(question: str) -> bool:
    """Whether a number of things is asked for."""
    return _COUNT.search(question) is not None and not options_of(question) and not works_on_text(question)


def works_on_text(question: str) -> bool:
    """Whether a text is to be read, copied, corrected or translated: the answer is then as that text is."""
    return _TEXT_WORK.search(question) is not None


def normal(text: str) -> str:
    """Lower case, words only, for comparing."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def exact(text: str) -> tuple[Decimal | str, ...]:
    """Lower case, words, numbers with their signs and decimals, and signs that mean something, for comparing.

    "-5 °C" and "5 °C", "1/2" and "1 2", "C++" and "C" differ; "1,000" is 1000.
    """
    found: list[Decimal | str] = []
    for match in _TOKEN.finditer(text.casefold().replace("−", "-")):
        found.append(Decimal(match[1].replace(",", "")) if match[1] else match[0])
    return tuple(found)
