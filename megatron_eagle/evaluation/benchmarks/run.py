"""Several benchmarks asked of one checkpoint: predictions, scores, submissions and the page."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.sample.tokenizer import recipe_tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.errors import BrokenSample, UserError
from megatron_eagle.evaluation.answer_log import AnswerLog
from megatron_eagle.evaluation.asking import Answers, Asking, check_answer_tokens, planner_to_ask
from megatron_eagle.evaluation.benchmarks.entry import Entry
from megatron_eagle.evaluation.benchmarks.files import PictureFile
from megatron_eagle.evaluation.benchmarks.locate import Request
from megatron_eagle.evaluation.benchmarks.page import Section, section_of, write_page
from megatron_eagle.evaluation.benchmarks.scoring import Result, Scored, score
from megatron_eagle.evaluation.benchmarks.submission import write_submission
from megatron_eagle.evaluation.loading import evaluation_layout, load_model, newest_checkpoint
from megatron_eagle.evaluation.prompt import Prompt, prompt_of
from megatron_eagle.parallel.groups import destroy, initialise
from megatron_eagle.training.run_folder import RunFolder

PREDICTIONS, SCORES, PAGE, PICTURES = "predictions.jsonl", "scores.json", "benchmarks.html", "pictures"


@dataclass(frozen=True)
class Wishes:
    """How to ask. limit: the first so many questions of each. answer_tokens: None is the benchmark's own.

    blank: ask once more with the pictures blanked.
    """

    limit: int | None = None
    answer_tokens: int | None = None
    blank: bool = False


def evaluate_benchmarks(
    recipe: Recipe,
    stage: Stage,
    run_folder: RunFolder,
    requests: Sequence[Request],
    out: Path,
    platform: Platform,
    wishes: Wishes,
) -> None:
    """Ask the newest checkpoint of ``stage`` all questions of ``requests``; every process of the run calls this.

    Writes ``out/<benchmark>/predictions.jsonl`` and, where answers are withheld, ``submission.json``; over all,
    ``out/scores.json`` and ``out/benchmarks.html``. Answers are on disk as they come: the same command after an
    interruption asks the rest.

    Raises UserError if a file cannot be read, or an answer leaves no room for a question.
    """
    layout = evaluation_layout(recipe, stage)
    for request in requests:
        check_answer_tokens(stage, _tokens(request, wishes))
    checkpoint = newest_checkpoint(recipe, stage, run_folder)
    groups = initialise(layout, platform, timeout=timedelta(minutes=recipe.collective_timeout_minutes))
    try:
        tokenizer = recipe_tokenizer(recipe)
        model = load_model(recipe, checkpoint, layout, platform)
        sections = []
        for request in requests:
            folder = out / request.benchmark.name
            entries, notes = _entries(request, folder, groups.rank, wishes.limit)
            tokens = _tokens(request, wishes)
            planner = planner_to_ask(recipe, stage, tokenizer, tokens)
            prompts, entries = _outlines(entries, planner)
            run = {
                "checkpoint": str(checkpoint.resolve()),
                "questions": hashlib.sha256(repr(entries).encode()).hexdigest(),
                "answer_tokens": tokens,
                "pack_length": stage.pack_length,
                "settings": repr(planner.settings),
            }
            asking = Asking(
                stage.pack_length,
                model,
                tokenizer,
                groups,
                platform,
                tokens,
                AnswerLog(folder),
                _Filler(entries, planner),
            )
            answers = asking.ask(prompts, run, blank=wishes.blank)
            if groups.rank == 0:
                whole = [one.broken(asking.broken[one.id]) if one.id in asking.broken else one for one in entries]
                sections.append(_finish(request, whole, answers, notes, folder))
                asking.log.remove()
        if groups.rank == 0:
            _write_all(out, sections, checkpoint)
    finally:
        destroy()


def _tokens(request: Request, wishes: Wishes) -> int:
    return request.benchmark.answer_tokens if wishes.answer_tokens is None else wishes.answer_tokens


def _entries(request: Request, folder: Path, rank: int, limit: int | None) -> tuple[list[Entry], tuple[str, ...]]:
    """What rank 0 reads, on every process; its pictures lie in ``folder`` until the benchmark is done."""
    message: list[Any] = [None]
    if rank == 0:
        try:
            with PictureFile(folder / PICTURES) as pictures:
                message = [request.read(pictures)]
        except (UserError, OSError) as error:
            message = [f"{request.benchmark.name}: {error}"]
    dist.broadcast_object_list(message, src=0)
    if isinstance(message[0], str):
        raise UserError(message[0])
    entries, notes = message[0]
    if limit is not None and limit < len(entries):
        entries, notes = entries[:limit], (*notes, f"the first {limit} of {len(entries)} questions")
    return entries, notes


def _outlines(entries: Sequence[Entry], planner: VisualPlanner) -> tuple[list[Prompt], list[Entry]]:
    """(what can be asked as far as headers say, the entries with the others broken)"""
    prompts, checked = [], []
    for entry in entries:
        if entry.question is not None:
            try:
                prompts.append(prompt_of(entry.stored(), planner, tiles=False))
            except BrokenSample as reason:
                entry = entry.broken(str(reason))
        checked.append(entry)
    return prompts, checked


class _Filler:
    """Gives a prompt its tiles, from the entry of its name."""

    def __init__(self, entries: Sequence[Entry], planner: VisualPlanner) -> None:
        self._entries, self._planner = {entry.id: entry for entry in entries}, planner

    def __call__(self, prompt: Prompt) -> Prompt:
        return prompt_of(self._entries[prompt.identity].stored(), self._planner)


def _finish(
    request: Request, entries: Sequence[Entry], answers: Answers, notes: tuple[str, ...], folder: Path
) -> Section:
    """Write what one benchmark gave, and say it."""
    said = {identity: answer.text for (identity, looking), answer in answers.items() if looking}
    blank = {identity: answer.text for (identity, looking), answer in answers.items() if not looking}
    cut_off = sum(not answer.complete for (_, looking), answer in answers.items() if looking)
    if cut_off:
        notes = (*notes, f"{cut_off} answers were cut off at their limit of tokens (--answer-tokens)")
    result, scored = score(request.benchmark, entries, said)
    without = score(request.benchmark, entries, blank)[0].value if blank else None
    try:
        with (folder / PREDICTIONS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(_line(one, blank), ensure_ascii=False) + "\n" for one in scored)
        submission = write_submission(request.benchmark, scored, folder) if result.value is None else None
        section = section_of(request.benchmark, result, without, scored, notes, submission)
        (folder / PICTURES).unlink()
    except OSError as error:
        raise UserError(f"cannot write results to {folder}: {error.strerror}") from None
    _say(result, scored, without)
    return section


def _line(one: Scored, blank: Mapping[str, str]) -> dict[str, Any]:
    question = one.entry.question
    line = {
        "id": one.entry.id,
        "category": one.entry.category,
        "question": question.text if question else None,
        "references": list(question.references) if question else [],
        "prediction": one.answer,
        "points": one.points,
    }
    if one.entry.id in blank:
        line["blank_prediction"] = blank[one.entry.id]
    return line | ({} if question else {"unreadable": one.entry.reason})


def _say(result: Result, scored: Sequence[Scored], without: float | None) -> None:
    for one in scored:
        if one.entry.question is None:
            print(f"unreadable: {result.benchmark}: {one.entry.id}: {one.entry.reason}")
    value = "answers are withheld" if result.value is None else f"{result.value:.1f}"
    blank = f", {without:.1f} with blanked images" if without is not None else ""
    counts = f"{result.questions} questions = {result.asked} asked + {result.unreadable} unreadable"
    left = f"; {result.left_out} without a picture left out" if result.left_out else ""
    undecided = f"; partial: {result.undecided} need a judge and count as wrong" if result.undecided else ""
    print(f"{result.benchmark}: {value}{blank} ({counts}{left}{undecided})", flush=True)


def _write_all(out: Path, sections: Sequence[Section], checkpoint: Path) -> None:
    scores = {
        "checkpoint": str(checkpoint),
        "benchmarks": {section.result.benchmark: asdict(replace(section.result, parts=dict(section.result.parts)))
                       for section in sections},
    }  # fmt: skip
    try:
        (out / SCORES).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        write_page(out / PAGE, sections, checkpoint)
    except OSError as error:
        raise UserError(f"cannot write results to {out}: {error.strerror}") from None
