"""Scores of a model that is being trained: the same processes ask it, with the weights as they stand.

Nothing of training changes: no weight, no random state, no mode of a module, no place in the data. The questions are
read once, before the first step; each replica asks its own share. Spread encoders encode the tiles with the copy that
every process has.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.sample.tokenizer import Tokenizer, recipe_tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.generate import generate
from megatron_eagle.evaluation.prompt import Prompt, pack_prompts, prompts_of
from megatron_eagle.evaluation.questions import questions_of
from megatron_eagle.parallel.agreement import refuse_together
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.training.engine import Engine
from megatron_eagle.training.evaluating import Evaluator


@dataclass(frozen=True)
class QuestionSet:
    """packs: all questions; references: what is right, by identity. An answer counts when it is that, as everywhere."""

    name: str
    packs: list[list[Prompt]]
    references: dict[str, str]


def make_evaluator(
    recipe: Recipe, stage: Stage, groups: Groups, platform: Platform, goes_on: Callable[[], None]
) -> Evaluator:
    """What asks the questions of ``stage.evaluation``; every process calls this, and a failure of one is everybody's.

    goes_on: called whenever questions are answered: all of them may take longer than anything else in training.

    Raises UserError if a data set cannot be read or has nothing to ask.
    """
    sets, message = [], None
    tokenizer = recipe_tokenizer(recipe)
    try:
        sets = _read(recipe, stage, tokenizer, say=groups.rank == 0)
    except (UserError, OSError) as error:
        message = f"stage '{stage.name}', evaluation: {error}"
    refuse_together(message)

    def evaluate(engine: Engine) -> dict[str, float]:
        with _asked(engine):
            return {one.name: _score(one, engine, stage, tokenizer, groups, platform, goes_on) for one in sets}

    return evaluate


def _read(recipe: Recipe, stage: Stage, tokenizer: Tokenizer, *, say: bool) -> list[QuestionSet]:
    settings = stage.evaluation
    assert settings is not None, f"stage '{stage.name}' is not evaluated"
    data = recipe.data_settings(stage)
    planner = VisualPlanner(replace(data, pack_length=stage.pack_length - settings.answer_tokens), tokenizer)
    sets = []
    for folder in map(Path, settings.data):
        questions, rejected = questions_of(islice(iterate_samples(folder), settings.limit))
        questions = questions[: settings.limit]
        prompts, broken = prompts_of(questions, planner)
        rejected |= broken
        if not prompts:
            raise UserError(f"{folder}: none of {len(rejected)} questions can be asked")
        if rejected and say:
            first, reason = next(iter(rejected.items()))
            print(f"{folder}: {len(rejected)} questions cannot be asked; {first}: {reason}", flush=True)
        references = {one.conversation.id: one.conversation.turns[-1].text.strip() for one in questions}
        packs = pack_prompts(prompts, stage.pack_length, settings.answer_tokens)
        sets.append(QuestionSet(folder.name, packs, references))
    return sets


def _score(
    asked: QuestionSet,
    engine: Engine,
    stage: Stage,
    tokenizer: Tokenizer,
    groups: Groups,
    platform: Platform,
    goes_on: Callable[[], None],
) -> float:
    """Share of right answers over all replicas."""
    assert stage.evaluation is not None
    answers = generate(
        engine.chunks[0].module,
        asked.packs[groups.dp_rank :: groups.dp_size],
        tokenizer,
        groups,
        platform.device,
        pack_length=stage.pack_length,
        answer_tokens=stage.evaluation.answer_tokens,
        encode=engine.encoder.copy if engine.encoder else None,
    )
    right = []
    for some in answers:
        goes_on()
        right += [answer.text.strip() == asked.references[name] for name, answer in some.items()]
    total = torch.tensor([sum(right), len(right)], dtype=torch.int64, device=platform.device)
    dist.all_reduce(total, group=groups.dp)
    goes_on()
    return int(total[0]) / int(total[1])


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
