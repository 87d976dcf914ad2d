"""From rows to questions: which columns mean what, and how a benchmark is asked.

Columns have the names that VLMEvalKit, Hugging Face's data sets and lmms-eval give them. Every row becomes an entry;
one that cannot be read has a reason instead of a question.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Any

from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.sample.conversation import Conversation, Turn, valid_unicode
from megatron_eagle.data.sample.markers import MARKER, escape_marks
from megatron_eagle.data.storage.shards import StoredSample
from megatron_eagle.errors import BrokenSample
from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark
from megatron_eagle.evaluation.benchmarks.files import Row
from megatron_eagle.evaluation.benchmarks.literals import list_of
from megatron_eagle.evaluation.benchmarks.tasks import Task, render

ID = ("index", "id", "questionId", "question_id", "pid")
QUESTION = ("query", "question")
ANSWERS = ("answers", "answer", "answer_option", "label", "gt_answer")
OPTIONS = ("options", "choices")
CATEGORY = ("category", "question_type", "split", "type", "task")
HALLUSION = ("category", "subcategory", "set_id", "figure_id", "question_id")
BY_LETTER = ("choice", "circular", "mmmu", "mathvista")  # rules whose reference may be an option's letter
OTHERS = (  # columns that rules, splits and submissions look at
    "hint", "l2-category", "subcategory", "set_id", "figure_id", "answer_type", "visual_input", "split", "questionId",
)  # fmt: skip
WITHHELD = "?"  # what MMMU's test set has for an answer

_PLACED = re.compile(r"<image (\d+)>")  # where MMMU shows a picture
_SAYS_HOW = re.compile(r"^(?:please )?answer\b.*\bletter\b", re.IGNORECASE | re.MULTILINE)  # as RealWorldQA does
_IN_TEXT = re.compile(r"(?:^|[\s,])([A-Z])[.:)]\s+([^\n]*?)(?=\s*,?\s[A-Z][.:)]\s|\n|$)")


@dataclass(frozen=True)
class Question:
    """text: as the model reads it, a mark for each picture. references: none if answers are withheld."""

    text: str
    pictures: tuple[FileSlice, ...]
    references: tuple[str, ...]
    options: Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """A row of a benchmark: a question, or the reason why it cannot be asked.

    fields: columns that rules look at. counts: whether it is of the split that the published number is of.
    """

    id: str
    category: str
    fields: Mapping[str, str]
    question: Question | None
    reason: str = ""
    counts: bool = True

    def broken(self, reason: str) -> "Entry":
        """The same without a question."""
        return replace(self, question=None, reason=reason)

    def stored(self) -> StoredSample:
        """The question as a sample whose next turn is the answer; raises BrokenSample."""
        assert self.question is not None, "a row without a question is not asked"
        names = tuple(f"{number}.picture" for number in range(len(self.question.pictures)))
        text = valid_unicode(self.question.text, "the question")
        conversation = Conversation(self.id, names, (Turn("user", text),))
        return StoredSample(conversation, tuple(picture.read() for picture in self.question.pictures))


@dataclass
class Entries:
    """Reads rows of one benchmark; remembers the ids it has seen."""

    benchmark: Benchmark
    task: Task | None = None
    _seen: dict[str, str] = field(default_factory=dict)

    def of(self, rows: Sequence[Row]) -> list[Entry]:
        """An entry a row. If no row has an answer, answers are withheld; where some have, one without is broken."""
        entries = self._of_split([self._entry(row) for row in rows])
        if any(entry.question and entry.question.references for entry in entries):
            return [
                entry.broken("it has no answer to score against")
                if entry.question and not entry.question.references
                else entry
                for entry in entries
            ]
        return entries

    def _of_split(self, entries: list[Entry]) -> list[Entry]:
        """The same, of which only the benchmark's split counts if the file has it."""
        split = self.benchmark.split
        if not split or not any(entry.fields.get("split") == split for entry in entries):
            return entries
        return [replace(entry, counts=entry.fields.get("split") == split) for entry in entries]

    def _entry(self, row: Row) -> Entry:
        identity = _identity(row)
        kept = {name: str(row.fields[name]) for name in OTHERS if row.fields.get(name) not in (None, "")}
        kept |= {"index": identity, "question_id": str(row.fields.get("question_id", ""))}
        entry = Entry(identity, _first(row.fields, CATEGORY) or "", kept, None)
        if identity in self._seen:
            again = f"index {identity} is that of {self._seen[identity]} already"
            return replace(entry, id=f"{identity} ({row.place})", reason=again)
        self._seen[identity] = row.place
        if row.fault:
            return entry.broken(row.fault)
        try:
            return replace(entry, question=self._question(row))
        except (BrokenSample, ValueError) as error:
            return entry.broken(str(error))

    def _question(self, row: Row) -> Question:
        fields = _without_nan(row.fields) if self.benchmark.rule == "circular" else row.fields
        text = _first(fields, QUESTION)
        if not text and not (self.task and self.task.text):
            raise ValueError(f"no question in it: columns {', '.join(QUESTION)} are missing or empty")
        options = _options(fields)
        listed = {} if options or self.benchmark.rule not in ("choice", "circular") else _options_in(text)
        references = self._references(fields, options or listed)
        asked = self._asked(fields, text, options, listed=bool(listed))
        placed, pictures = _placed(asked, row.pictures)
        return Question(placed, pictures, references, options or listed)

    def _asked(self, fields: Mapping[str, Any], text: str, options: Mapping[str, str], *, listed: bool) -> str:
        """listed: the text holds options itself."""
        if self.task and self.task.text:
            return str(render(self.task.text, fields))
        if listed:
            return text if _SAYS_HOW.search(text) else text + self.benchmark.options
        if not options or not self.benchmark.options:  # MathVista's texts hold their options
            return text + self.benchmark.ask
        hint = f"Hint: {fields['hint']}\n" if fields.get("hint") else ""
        lines = "\n".join(f"{letter}. {words}" for letter, words in options.items())
        return f"{hint}{text}\n{lines}{self.benchmark.options}"

    def _references(self, fields: Mapping[str, Any], options: Mapping[str, str]) -> tuple[str, ...]:
        if self.task and self.task.target:
            found = self._answers(render(self.task.target, fields))
        else:
            found = next((given for name in ANSWERS if (given := self._answers(fields.get(name)))), [])
        if options and self.benchmark.rule in BY_LETTER:
            texts = self.benchmark.rule == "mathvista"
            return tuple(_letter_of(answer, options, fields, texts=texts) for answer in found)
        return tuple(found)

    def _answers(self, value: Any) -> list[str]:
        """All that are right; a list of MathVista's is one answer."""
        if self.benchmark.rule == "mathvista":
            return [] if value is None or value == "" else [str(value)]
        return [] if self.benchmark.rule == "mmmu" and value == WITHHELD else list_of(value)


def _identity(row: Row) -> str:
    """What a file calls the row, its place if nothing does; HallusionBench's Parquet has no such column."""
    if all(row.fields.get(name) not in (None, "") for name in HALLUSION):
        return "_".join(str(row.fields[name]) for name in HALLUSION)
    return _first(row.fields, ID) or row.place


def _letter_of(answer: str, options: Mapping[str, str], fields: Mapping[str, Any], *, texts: bool) -> str:
    """The letter that a reference means: itself, else what a whole number or a text says.

    texts: it is an option's text, as in MathVista's Parquet; else a place from 0, as in AI2D's.
    """
    letter = str(fields.get("answer_option") or answer).strip()
    if letter in options:
        return letter
    meant = [name for name, text in options.items() if texts and answer == text]
    if not texts and answer.isdigit():
        meant = list(options)[int(answer) : int(answer) + 1]
    if not meant:
        raise ValueError(f"its answer {answer!r} is none of the options {', '.join(options)}")
    return meant[0]


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of several columns that has something in it."""
    return next((str(fields[name]) for name in names if fields.get(name) not in (None, "")), "")


def _options(fields: Mapping[str, Any]) -> dict[str, str]:
    """Letter -> text, from columns A, B, ... or from a list."""
    for name in OPTIONS:
        if len(texts := list_of(fields.get(name))) > 1:
            return dict(zip(ascii_uppercase, texts, strict=False))
    return {letter: str(fields[letter]) for letter in ascii_uppercase if fields.get(letter) not in (None, "")}


def _without_nan(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without the "nan" that Hugging Face's MMBench has for no hint and no option; kept if no option would be left."""
    empty = {name for name in ("hint", *ascii_uppercase) if str(fields.get(name)).strip().lower() == "nan"}
    if not any(fields.get(letter) not in (None, "") and letter not in empty for letter in ascii_uppercase):
        empty &= {"hint"}
    return {name: value for name, value in fields.items() if name not in empty}


def _options_in(text: str) -> dict[str, str]:
    """Two options or more that a question itself lists, in order from A."""
    found: dict[str, str] = {}
    for letter, words in _IN_TEXT.findall(text):
        if letter == ascii_uppercase[len(found)]:
            found[letter] = words.strip()
    return found if len(found) > 1 else {}


def _placed(text: str, pictures: Sequence[FileSlice]) -> tuple[str, tuple[FileSlice, ...]]:
    """The text with a mark where each picture is shown: at ``<image 2>`` the second, else all before the text."""
    parts = _PLACED.split(text)
    numbers = [int(number) for number in parts[1::2]]
    if not numbers or not pictures:
        return f"{MARKER}\n" * len(pictures) + escape_marks(text), tuple(pictures)
    if beyond := [number for number in numbers if not 1 <= number <= len(pictures)]:
        raise ValueError(f"it shows <image {beyond[0]}> and has {len(pictures)} pictures")
    words = [escape_marks(part) for part in parts[0::2]]
    return MARKER.join(words), tuple(pictures[number - 1] for number in numbers)
