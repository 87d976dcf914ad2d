"""Several benchmarks asked of one checkpoint: predictions, scores, submissions and the page."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.build.shard_writer import write_atomically
from megatron_eagle.data.sample.tokenizer import recipe_tokenizer
from megatron_eagle.endpoint.queue import Queue
from megatron_eagle.endpoint.settings import Endpoint
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.answer_log import AnswerLog
from megatron_eagle.evaluation.asking import Answers, Asking, check_answer_tokens, planner_to_ask
from megatron_eagle.evaluation.benchmarks.entry import Entry
from megatron_eagle.evaluation.benchmarks.judge import judged
from megatron_eagle.evaluation.benchmarks.locate import Request
from megatron_eagle.evaluation.benchmarks.page import Section, section_of, write_page
from megatron_eagle.evaluation.benchmarks.prepare import Filler, outlines, read_entries
from megatron_eagle.evaluation.benchmarks.scoring import Result, Scored, result_of, score
from megatron_eagle.evaluation.benchmarks.submission import write_submission
from megatron_eagle.evaluation.loading import EMA_WORDS, evaluation_layout, load_model, model_to_ask
from megatron_eagle.evaluation.sampling import GREEDY, Sampling
from megatron_eagle.parallel.groups import destroy, initialise
from megatron_eagle.training.run_folder import RunFolder

PREDICTIONS, SCORES, PAGE, PICTURES, JUDGE = (
    "predictions.jsonl",
    "scores.json",
    "benchmarks.html",
    "pictures",
    "judge",
)


@dataclass(frozen=True)
class Wishes:
    """How to ask. limit: the first so many questions of each. answer_tokens: None is the benchmark's own.

    blank: ask once more with the pictures blanked. judge: is asked what no rule can tell. sampling: which token
    follows.
    """

    limit: int | None = None
    answer_tokens: int | None = None
    blank: bool = False
    judge: Endpoint | None = None
    sampling: Sampling = GREEDY


def evaluate_benchmarks(
    recipe: Recipe,
    stage: Stage,
    run_folder: RunFolder,
    requests: Sequence[Request],
    out: Path,
    platform: Platform,
    wishes: Wishes,
    *,
    before: bool = False,
    ema: bool = False,
) -> None:
    """Ask the newest checkpoint of ``stage`` all questions of ``requests``; every process of the run calls this.

    Writes ``out/<benchmark>/predictions.jsonl`` and, where answers are withheld, ``submission.json``; over all,
    ``out/scores.json`` and ``out/benchmarks.html``. Answers are on disk as they come: the same command after an
    interruption asks the rest.

    before: ask what the stage starts from instead. ema: ask the running mean of its weights.

    Raises UserError if a file cannot be read, or an answer leaves no room for a question.
    """
    layout = evaluation_layout(recipe, stage)
    for request in requests:
        check_answer_tokens(stage, _tokens(request, wishes))
    recipe, checkpoint = model_to_ask(recipe, stage, run_folder, before=before)
    done: list[_Done] = []
    groups = initialise(layout, platform, timeout=timedelta(minutes=recipe.collective_timeout_minutes))
    try:
        tokenizer = recipe_tokenizer(recipe)
        model = load_model(recipe, checkpoint, layout, platform, ema=ema)
        for request in requests:
            folder = out / request.benchmark.name
            entries, notes = read_entries(request, folder / PICTURES, wishes.limit)
            notes += tuple(f"answers are drawn: {drawn}" for drawn in wishes.sampling.record.values())
            tokens = _tokens(request, wishes)
            planner = planner_to_ask(recipe, stage, tokenizer, tokens)
            prompts, entries = outlines(entries, planner)
            run = {
                "checkpoint": str(checkpoint.resolve()) + EMA_WORDS * ema,
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
                wishes.sampling,
                Filler(entries, planner),
            )
            answers = asking.ask(prompts, run, blank=wishes.blank)
            if groups.rank == 0:
                whole = [one.broken(asking.broken[one.id]) if one.id in asking.broken else one for one in entries]
                done.append(_scores(request, whole, answers, notes, folder, asking.log))
                for entry in whole:
                    if entry.question is None and entry.counts:
                        print(f"unreadable: {request.benchmark.name}: {entry.id}: {entry.reason}")
                _say(done[-1])
    finally:
        destroy()
    if done:  # on rank 0; the others do not wait for the judge
        if wishes.judge is not None and any(one.result.undecided for one in done):
            done = _judged(done, wishes.judge, out / JUDGE)
        _write(done, out, f"{checkpoint}{EMA_WORDS * ema}", wishes.sampling)


def _tokens(request: Request, wishes: Wishes) -> int:
    return request.benchmark.answer_tokens if wishes.answer_tokens is None else wishes.answer_tokens


@dataclass(frozen=True)
class _Done:
    """A benchmark that was asked. blank: answers without seeing, none if that was not asked."""

    request: Request
    scored: Sequence[Scored]
    result: Result
    blank: Mapping[str, str]
    without: float | None
    notes: tuple[str, ...]
    folder: Path
    log: AnswerLog


def _scores(
    request: Request, entries: Sequence[Entry], answers: Answers, notes: tuple[str, ...], folder: Path, log: AnswerLog
) -> _Done:
    """What one benchmark gave, by rule alone."""
    said = {identity: answer.text for (identity, looking), answer in answers.items() if looking}
    blank = {identity: answer.text for (identity, looking), answer in answers.items() if not looking}
    cut_off = sum(not answer.complete for (_, looking), answer in answers.items() if looking)
    if cut_off:
        notes = (*notes, f"{cut_off} answers were cut off at their limit of tokens (--answer-tokens)")
    result, scored = score(request.benchmark, entries, said)
    without = score(request.benchmark, entries, blank)[0].value if blank else None
    return _Done(request, scored, result, blank, without, notes, folder, log)


def _judged(done: Sequence[_Done], judge: Endpoint, folder: Path) -> list[_Done]:
    """The same with what ``judge`` says of those that are undecided; its answers lie in ``folder``."""
    finished = []
    with Queue(judge, folder) as queue:
        for one in done:
            if one.result.undecided:
                benchmark = one.request.benchmark
                scored = judged(benchmark, one.scored, queue)
                result = result_of(benchmark, scored, one.result.left_out)
                one = replace(one, scored=scored, result=result, notes=(*one.notes, f"judged by {judge.model}"))
                _say(one)
            finished.append(one)
        print(f"judge {judge.model}: {queue.counts}")
    return finished


def _write(done: Sequence[_Done], out: Path, checkpoint: str, sampling: Sampling) -> None:
    """Predictions and submissions of each, the scores and the page of all; what was kept for them goes."""
    results = {one.request.benchmark.name: asdict(replace(one.result, parts=dict(one.result.parts))) for one in done}
    try:
        sections = [_write_one(one) for one in done]
        scores = {"checkpoint": checkpoint, "benchmarks": results, **sampling.record}
        write_atomically(out / SCORES, json.dumps(scores, indent=1) + "\n")
        write_page(out / PAGE, sections, checkpoint)
        for one in done:
            (one.folder / PICTURES).unlink()
            one.log.remove()
    except OSError as error:
        raise UserError(f"cannot write results to {out}: {error.strerror}") from None


def _write_one(one: _Done) -> Section:
    benchmark = one.request.benchmark
    lines = (json.dumps(_line(each, one.blank), ensure_ascii=False) + "\n" for each in one.scored)
    write_atomically(one.folder / PREDICTIONS, "".join(lines))
    submission = write_submission(benchmark, one.scored, one.folder) if one.result.value is None else None
    return section_of(benchmark, one.result, one.without, one.scored, one.notes, submission)


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


def _say(done: _Done) -> None:
    result, without = done.result, done.without
    value = "no score, the file has no answers" if result.value is None else f"{result.value:.1f}"
    blank = f", {without:.1f} with blanked images" if without is not None else ""
    counts = f"{result.questions} questions = {result.asked} asked + {result.unreadable} unreadable"
    which = "without a picture" if done.request.benchmark.pictures_only else "of other splits"
    left = f"; {result.left_out} {which} left out" if result.left_out else ""
    undecided = f"; partial: {result.undecided} need a judge and count as wrong" if result.undecided else ""
    print(f"{result.benchmark}: {value}{blank} ({counts}{left}{undecided})", flush=True)
