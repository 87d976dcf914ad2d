"""Scores a checkpoint: every question of a data set answered twice, with its images and with them blanked.

The blank run tells what the model can guess without looking; only the difference is sight. An answer counts when it
equals the reference after surrounding white space is removed, nothing softer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.build.shard_writer import write_atomically
from megatron_eagle.data.sample.conversation import Conversation
from megatron_eagle.data.sample.tokenizer import recipe_tokenizer
from megatron_eagle.data.storage.shards import dataset_identity, iterate_samples
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.answer_log import AnswerLog
from megatron_eagle.evaluation.asking import (
    Answers,
    Asking,
    check_answer_tokens,
    planner_to_ask,
)
from megatron_eagle.evaluation.loading import EMA_WORDS, evaluation_layout, load_model, model_to_ask
from megatron_eagle.evaluation.prompt import prompts_of
from megatron_eagle.evaluation.questions import questions_of
from megatron_eagle.evaluation.sampling import GREEDY, Sampling
from megatron_eagle.parallel.groups import destroy, initialise
from megatron_eagle.training.run_folder import RunFolder

PREDICTIONS = "predictions.jsonl"
ACCURACY = "accuracy.json"


@dataclass(frozen=True)
class Prediction:
    """One question, its reference answer, and the model's answers with the images and with them blanked.

    complete: whether the answer with images ended by itself, not at the limit of tokens.
    """

    id: str
    task: str
    question: str
    answer: str
    prediction: str
    blank_prediction: str
    complete: bool = True

    @property
    def correct(self) -> bool:
        return self.prediction.strip() == self.answer.strip()

    @property
    def blank_correct(self) -> bool:
        return self.blank_prediction.strip() == self.answer.strip()


def evaluate(
    recipe: Recipe,
    stage: Stage,
    run_folder: RunFolder,
    data: Path,
    out: Path,
    platform: Platform,
    answer_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    before: bool = False,
    ema: bool = False,
) -> None:
    """Answer all questions of ``data`` with the newest checkpoint of ``stage``; every process of the run calls this.

    before: with what the stage starts from instead. ema: with the running mean of its weights.

    Writes ``predictions.jsonl`` (one Prediction a line) and ``accuracy.json`` into ``out``. Questions that cannot be
    asked (``questions.py``), whose media are broken, or that do not fit into a pack, are left out, named and counted.
    Answers are on disk as they come: the same command after an interruption generates the others only.

    Raises UserError if ``answer_tokens`` is below 1 or leaves no room for a question, or if nothing can be asked.
    """
    layout = evaluation_layout(recipe, stage)
    check_answer_tokens(stage, answer_tokens)
    recipe, checkpoint = model_to_ask(recipe, stage, run_folder, before=before)
    groups = initialise(layout, platform, timeout=timedelta(minutes=recipe.collective_timeout_minutes))
    try:
        tokenizer = recipe_tokenizer(recipe)
        questions, rejected = questions_of(iterate_samples(data))
        prompts, broken = prompts_of(questions, planner_to_ask(recipe, stage, tokenizer, answer_tokens))
        rejected |= broken
        if not prompts:
            first = next(iter(rejected.items()), ("", "the data set is empty"))
            raise UserError(f"{data}: none of {len(rejected)} questions can be asked; {first[0]}: {first[1]}")
        if groups.rank == 0:
            _say_what_is_not_asked(rejected, len(prompts))
        model = load_model(recipe, checkpoint, layout, platform, ema=ema)
        run = {
            "checkpoint": str(checkpoint.resolve()) + EMA_WORDS * ema,
            "data": dataset_identity(data),
            "answer_tokens": answer_tokens,
            "pack_length": stage.pack_length,
            "settings": repr(recipe.data_settings(stage)),
        }
        asking = Asking(stage.pack_length, model, tokenizer, groups, platform, answer_tokens, AnswerLog(out), sampling)
        answers = asking.ask(prompts, run, blank=True)
        if groups.rank == 0:
            asked = [one.conversation for one in questions if one.conversation.id not in rejected]
            predictions = [_prediction(conversation, answers) for conversation in asked]
            longer = sum(len(tokenizer.encode(prediction.answer)) > answer_tokens for prediction in predictions)
            _write(out, predictions, rejected, answer_tokens, longer, sampling)
            asking.log.remove()
    finally:
        destroy()


def _prediction(conversation: Conversation, answers: Answers) -> Prediction:
    answer = answers[conversation.id, True]
    return Prediction(
        id=conversation.id,
        task=str(conversation.extra.get("task", "all")),
        question=[turn.text for turn in conversation.turns if turn.role == "user"][-1],
        answer=conversation.turns[-1].text,
        prediction=answer.text,
        blank_prediction=answers[conversation.id, False].text,
        complete=answer.complete,
    )


def _say_what_is_not_asked(rejected: Mapping[str, str], asked: int) -> None:
    for identity, reason in rejected.items():
        print(f"not asked: {identity}: {reason}")
    if rejected:
        print(f"{asked} questions are asked, {len(rejected)} cannot be", flush=True)


def read_predictions(folder: Path) -> list[Prediction]:
    """The predictions that ``evaluate`` wrote into ``folder``."""
    lines = (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
    return [Prediction(**json.loads(line)) for line in lines]


def _write(
    out: Path,
    predictions: Sequence[Prediction],
    rejected: Mapping[str, str],
    answer_tokens: int,
    longer: int,
    sampling: Sampling,
) -> None:
    """longer: reference answers of more than ``answer_tokens`` tokens, which no answer can equal."""
    cut_off = sum(not prediction.complete for prediction in predictions)
    tasks: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        tasks.setdefault(prediction.task, []).append(prediction)
    accuracy = {
        "questions": len(predictions),
        "overall": _share([p.correct for p in predictions]),
        "blank_images": _share([p.blank_correct for p in predictions]),
        "rejected": rejected,
        "cut_off": cut_off,
        "references_over_the_limit": longer,
        "per_task": {task: _share([p.correct for p in group]) for task, group in sorted(tasks.items())},
        **sampling.record,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions)
        write_atomically(out / PREDICTIONS, text)
        write_atomically(out / ACCURACY, json.dumps(accuracy, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write results to {out}: {error.strerror}") from None
    right, blank = accuracy["overall"], accuracy["blank_images"]
    left_out = f" ({len(rejected)} could not be asked)" if rejected else ""
    print(f"{len(predictions)} questions{left_out}: {right:.1%} right, {blank:.1%} with blanked images")
    if cut_off or longer:
        print(
            f"of {len(predictions)} answers {cut_off} were cut off at {answer_tokens} tokens; {longer} references are "
            "longer than that and cannot be matched (--answer-tokens)"
        )


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts) if verdicts else 0.0
