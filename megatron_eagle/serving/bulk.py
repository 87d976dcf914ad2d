"""Questions of a JSONL file answered into another: resumable, and every question read is answered or failed.

A question is ``{"question": "..."}`` with, as needed, ``id`` (by default the number of its line), ``image`` and
``video`` (one file or a list, seen from the file's folder) and ``system``. An answer is ``{"id", "asked", "answer",
"complete"}``, or has ``error`` instead of the last two; ``asked`` is a digest of question, model and options, in which
pictures and videos stand by their names.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_eagle.errors import UserError
from megatron_eagle.progress import Progress
from megatron_eagle.serving.answerer import Answerer, Prompt
from megatron_eagle.serving.conversation import Medium, Options, question

KEYS = ("id", "question", "image", "video", "system")
BEGIN = b'{"id": '  # of every line of answers


@dataclass(frozen=True)
class Counts:
    """Questions of a file: read = answered + failed; known: of these, from an earlier run."""

    read: int
    answered: int
    failed: int
    known: int


@dataclass(frozen=True)
class _Question:
    """A line that is a question; asked: see above."""

    identity: str
    asked: str
    record: dict[str, Any]


def answer_file(
    answerer: Answerer, questions: Path, answers: Path, options: Options, *, model: str, batch: int, system: str | None
) -> Counts:
    """Answer what is in ``questions`` and not yet in ``answers``, ``batch`` questions at a time; failed ones again.

    model: what the model is recognised by. system: of questions that bring none; None leaves the model its own.
    Raises UserError, and leaves ``answers`` as it is, if that holds anything but answers to these questions by this
    model with these options.
    """
    if answers.exists() and questions.exists() and answers.samefile(questions):
        raise UserError(f"{answers} holds the questions; give another file for the answers")
    said = {"model": model, **asdict(options), "system": system}
    lines = list(_read(questions, said))
    known = _known(answers, {one.identity: one.asked for one in lines})
    left = [one for one in lines if one.identity not in known]
    answers.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    bar = Progress("answering", total=len(lines), initial=len(known), unit="questions")
    with answers.open("a", encoding="utf-8") as out, bar:
        for start in range(0, len(left), batch):
            for entry in _answer(answerer, left[start : start + batch], questions.parent, options, system):
                out.write(_line(entry))
                out.flush()
                if "error" in entry:
                    failed += 1
                    bar.say(f"question {entry['id']} failed: {entry['error']}")
                bar.update()
    return Counts(len(lines), len(lines) - failed, failed, len(known))


def _read(file: Path, said: dict[str, Any]) -> Iterator[_Question]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    taken: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            record = {"error": f"line {number} is no JSON object"}
        identity = str(record.get("id", number))
        if identity in taken:
            raise UserError(f"{file}: line {number} has the id {identity!r} of an earlier line")
        taken.add(identity)
        text = json.dumps([said, record], sort_keys=True)
        yield _Question(identity, hashlib.sha256(text.encode()).hexdigest()[:16], record)


def _known(answers: Path, asked: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Answers of an earlier run by id. Everything is looked at before anything is changed: then a last line torn by a
    kill goes, and so do the lines of questions that failed, which are to be tried again."""
    if not answers.exists():
        return {}
    try:
        whole, _, tail = answers.read_bytes().rpartition(b"\n")
    except OSError as error:
        raise UserError(f"{answers} cannot be read: {error.strerror}") from None
    lines = [*whole.splitlines(), *([tail] if tail and not _is_torn(tail) else [])]
    known: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        entry = _entry(line)
        if entry is None:
            raise UserError(f"{answers}: line {number} is no answer; give another file")
        identity = entry["id"]
        if asked.get(identity) != entry["asked"] and ("error" not in entry or identity not in asked):
            raise UserError(
                f"{answers} holds an answer to question {identity!r} as it was asked of another model, with other "
                "options or in other words; give another file"
            )
        if "error" not in entry:
            known[identity] = entry
    if tail or len(known) < len(lines):
        _write_whole(answers, known.values())
    return known


def _is_torn(tail: bytes) -> bool:
    """Whether bytes without a line's end are the beginning of an answer."""
    try:
        json.loads(tail)
    except (ValueError, RecursionError):
        return tail.startswith(BEGIN) or BEGIN.startswith(tail)
    return False


def _entry(line: bytes) -> dict[str, Any] | None:
    """The answer or failure in a line; None if it is neither."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not {"answer", "error"} & set(entry):
        return None
    return entry if isinstance(entry.get("id"), str) and isinstance(entry.get("asked"), str) else None


def _write_whole(answers: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Put ``entries`` in place of the file; a kill leaves the one or the other."""
    target = answers.resolve()
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(_line(entry) for entry in entries)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _answer(
    answerer: Answerer, questions: Sequence[_Question], folder: Path, options: Options, system: str | None
) -> Iterator[dict[str, Any]]:
    """An entry for each question, in order; a broken one does not keep the others of its batch."""
    prompts: list[Prompt | str] = []
    for one in questions:
        try:
            prompts.append(_prepare(answerer, one.record, folder, options, system))
        except UserError as error:
            prompts.append(str(error))
    sound = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
    answers = iter(answerer.answer_all(sound, options) if sound else [])
    for one, prompt in zip(questions, prompts, strict=True):
        entry: dict[str, Any] = {"id": one.identity, "asked": one.asked}
        if isinstance(prompt, str):
            yield {**entry, "error": prompt}
        else:
            answer = next(answers)
            yield {**entry, "answer": answer.text, "complete": answer.end.reason == "stop"}


def _prepare(answerer: Answerer, record: dict[str, Any], folder: Path, options: Options, system: str | None) -> Prompt:
    if "error" in record and "question" not in record:
        raise UserError(str(record["error"]))
    if strange := sorted(set(record) - set(KEYS)):
        raise UserError(f"it has {', '.join(strange)}; known are {', '.join(KEYS)}")
    text = record.get("question")
    if not isinstance(text, str):
        raise UserError("it has no 'question' that is a text")
    media = [*_media(record, "image", folder), *_media(record, "video", folder)]
    return answerer.prepare(question(text, media, record.get("system", system)), options)


def _media(record: dict[str, Any], kind: Literal["image", "video"], folder: Path) -> list[Medium]:
    given = record.get(kind) or []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{kind} should be a file's name or a list of them")
    return [read_medium(kind, folder / name) for name in names]


def read_medium(kind: Literal["image", "video"], file: Path) -> Medium:
    """A picture or a video from a file; UserError if it cannot be read."""
    try:
        return Medium(kind, file.name, file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
