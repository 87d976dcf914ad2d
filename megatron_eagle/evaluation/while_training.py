"""Scores of a model that is being trained: the same processes ask it, with the weights as they stand.

Nothing of training changes: no weight, no random state, no mode of a module, no place in the data. The questions are
read once, before the first step, a benchmark's pictures into a file of the run's folder; each replica asks its own
share. Spread encoders encode the tiles with the copy that every process has.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch.distributed as dist

from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.evaluation import EvaluationSettings
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.sample.tokenizer import Tokenizer, recipe_tokenizer
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.asking import as_it_is, check_answer_tokens, filled, planner_to_ask
from megatron_eagle.evaluation.benchmarks.locate import Request, parse_requests
from megatron_eagle.evaluation.benchmarks.prepare import Filler, outlines, read_entries
from megatron_eagle.evaluation.benchmarks.scoring import score
from megatron_eagle.evaluation.generate import generate
from megatron_eagle.evaluation.prompt import Prompt, pack_prompts, prompts_of
from megatron_eagle.evaluation.questions import questions_of
from megatron_eagle.parallel.agreement import on_rank_zero, refuse_together
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.training.engine import Engine
from megatron_eagle.training.evaluating import Evaluator

PICTURES = Path("evaluation") / "while_training"  # in the run's folder


@dataclass(frozen=True)
class QuestionSet:
    """Questions with a score of their own.

    packs: all of them. fill: gives one its tiles when it is next. score: between 0 and 1, from the answers of all
        replicas by identity; what has none could not be read.
    """

    name: str
    packs: list[list[Prompt]]
    answer_tokens: int
    fill: Callable[[Prompt], Prompt]
    score: Callable[[Mapping[str, str]], float]


def make_evaluator(
    recipe: Recipe, stage: Stage, groups: Groups, platform: Platform, run: Path, goes_on: Callable[[], None]
) -> Evaluator:
    """What asks the questions of ``stage.evaluation``; every process calls this, and a failure of one is everybody's.

    run: the run's folder, where pictures of benchmarks lie while it trains. goes_on: called whenever questions are
    answered: all of them may take longer than anything else in training.

    Raises UserError if a data set or a benchmark cannot be read, or has nothing to ask or to score.
    """
    tokenizer = recipe_tokenizer(recipe)
    try:
        requests = on_rank_zero(lambda: _requests(stage))  # before anything is read
        sets = _data_sets(recipe, stage, tokenizer, say=groups.rank == 0)
        for request in requests:
            pictures = run / PICTURES / stage.name / request.benchmark.name
            sets.append(_benchmark(request, recipe, stage, tokenizer, pictures, say=groups.rank == 0))
    except (UserError, OSError) as error:
        raise UserError(f"stage '{stage.name}', evaluation: {error}") from None

    def evaluate(engine: Engine) -> dict[str, float]:
        with _asked(engine):
            return {one.name: _score(one, engine, stage, tokenizer, groups, platform, goes_on) for one in sets}

    return evaluate


def _settings(stage: Stage) -> EvaluationSettings:
    assert stage.evaluation is not None, f"stage '{stage.name}' is not evaluated"
    return stage.evaluation


def _requests(stage: Stage) -> list[Request]:
    settings = _settings(stage)
    if settings.benchmark_data is None:
        return []
    requests = parse_requests(",".join(settings.benchmarks), Path(settings.benchmark_data))
    for request in requests:
        if request.benchmark.rule == "judge":
            raise UserError(f"{request.benchmark.name} is scored by a judge, and none is asked while a stage trains")
        check_answer_tokens(stage, request.benchmark.answer_tokens)
    return requests


def _data_sets(recipe: Recipe, stage: Stage, tokenizer: Tokenizer, *, say: bool) -> list[QuestionSet]:
    """The same on every process, or a UserError on all."""
    sets, message = [], None
    try:
        sets = [_data_set(Path(folder), recipe, stage, tokenizer, say=say) for folder in _settings(stage).data]
    except (UserError, OSError) as error:
        message = str(error)
    refuse_together(message)
    return sets


def _data_set(folder: Path, recipe: Recipe, stage: Stage, tokenizer: Tokenizer, *, say: bool) -> QuestionSet:
    """A data set, whose tiles are kept in memory; an answer counts when it is the reference, as in ``evaluate``."""
    settings = _settings(stage)
    questions, rejected = questions_of(islice(iterate_samples(folder), settings.limit))
    questions = questions[: settings.limit]
    prompts, broken = prompts_of(questions, planner_to_ask(recipe, stage, tokenizer, settings.answer_tokens))
    rejected |= broken
    if not prompts:
        raise UserError(f"{folder}: none of {len(rejected)} questions can be asked")
    if rejected and say:
        _say_what_is_not_asked(str(folder), rejected, "")
    references = {one.conversation.id: one.conversation.turns[-1].text.strip() for one in questions}

    def share(answers: Mapping[str, str]) -> float:
        return sum(text.strip() == references[name] for name, text in answers.items()) / len(answers)

    packs = pack_prompts(prompts, stage.pack_length, settings.answer_tokens)
    return QuestionSet(folder.name, packs, settings.answer_tokens, as_it_is, share)


def _benchmark(
    request: Request, recipe: Recipe, stage: Stage, tokenizer: Tokenizer, pictures: Path, *, say: bool
) -> QuestionSet:
    """A benchmark, scored by its own rule as ``evaluate`` does; every process calls this at the same place."""
    benchmark = request.benchmark
    entries, _ = read_entries(request, pictures, _settings(stage).limit)
    planner = planner_to_ask(recipe, stage, tokenizer, benchmark.answer_tokens)
    prompts, entries = outlines(entries, planner)
    unreadable = {entry.id: entry.reason for entry in entries if entry.question is None and entry.counts}
    if not prompts:
        first = next(iter(unreadable.items()), ("", "the file is empty"))
        raise UserError(f"{benchmark.name}: none of {len(unreadable)} questions can be asked; {first[0]}: {first[1]}")
    if not any(entry.question and entry.question.references for entry in entries):
        raise UserError(f"{benchmark.name}: {request.files[0]} has no answers to score against")
    if unreadable and say:
        _say_what_is_not_asked(benchmark.name, unreadable, " and are wrong")

    def share(answers: Mapping[str, str]) -> float:
        value = score(benchmark, entries, answers)[0].value
        assert value is not None, "there are references"
        return value / benchmark.scale

    packs = pack_prompts(prompts, stage.pack_length, benchmark.answer_tokens)
    return QuestionSet(benchmark.name, packs, benchmark.answer_tokens, Filler(entries, planner), share)


def _say_what_is_not_asked(name: str, reasons: Mapping[str, str], and_are: str) -> None:
    first, reason = next(iter(reasons.items()))
    print(f"{name}: {len(reasons)} questions cannot be asked{and_are}; {first}: {reason}", flush=True)


def _score(
    asked: QuestionSet,
    engine: Engine,
    stage: Stage,
    tokenizer: Tokenizer,
    groups: Groups,
    platform: Platform,
    goes_on: Callable[[], None],
) -> float:
    """The score of all replicas' answers, on every process; pictures that turn out to be broken are said on rank 0."""
    said: dict[str, str] = {}
    broken: dict[str, str] = {}
    for some in generate(
        engine.chunks[0].module,
        filled(asked.packs[groups.dp_rank :: groups.dp_size], asked.fill, broken),
        tokenizer,
        groups,
        platform.device,
        pack_length=stage.pack_length,
        answer_tokens=asked.answer_tokens,
        encode=engine.encoder.copy if engine.encoder else None,
    ):
        goes_on()
        said |= {name: answer.text for name, answer in some.items()}
    parts: list[tuple[dict[str, str], dict[str, str]]] = [({}, {})] * groups.dp_size
    dist.all_gather_object(parts, (said, broken), group=groups.dp)
    goes_on()
    reasons = {name: reason for _, some in parts for name, reason in some.items()}
    if reasons and groups.rank == 0:
        _say_what_is_not_asked(asked.name, reasons, " and are wrong")
    return asked.score({name: text for some, _ in parts for name, text in some.items()})


@contextmanager
def _asked(engine: Engine) -> Iterator[None]:
    """The engine's modules in eval mode, and Megatron's schedule without what it does around gradients."""
    modules = [*engine.chunks, *([engine.encoder.copy] if engine.encoder else [])]
    modes = [module.training for module in modules]
    config = engine.models[0].config
    no_sync, config.no_sync_func = config.no_sync_func, None
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        config.no_sync_func = no_sync
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
