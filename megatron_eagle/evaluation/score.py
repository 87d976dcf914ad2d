"""Scores a checkpoint: every question of a data set answered twice, with its images and with them blanked.

The blank run tells what the model can guess without looking; only the difference is sight. An answer counts when it
equals the reference after surrounding white space is removed, nothing softer.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import Float16Module
from tqdm import tqdm

from megatron_eagle.checkpoint.files import (
    find_latest,
    load_weights,
    read_description,
    require_adapters,
    require_same_model,
)
from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.sample.conversation import Conversation
from megatron_eagle.data.sample.tokenizer import Tokenizer, recipe_tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.shards import StoredSample, dataset_identity, iterate_samples
from megatron_eagle.data.stream.encode import add_tiles, tokenise
from megatron_eagle.errors import BrokenSample, UserError
from megatron_eagle.evaluation.answer_log import Answer, AnswerLog
from megatron_eagle.evaluation.generate import Prompt, generate, pack_prompts
from megatron_eagle.evaluation.questions import questions_of
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.parallel.groups import Groups, destroy, initialise
from megatron_eagle.training.adapters import base_checkpoint, load_base
from megatron_eagle.training.engine import build_chunks
from megatron_eagle.training.run_folder import RunFolder

PREDICTIONS = "predictions.jsonl"
ACCURACY = "accuracy.json"
BLANK_GREY = 128


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
    recipe: Recipe, stage: Stage, run_folder: RunFolder, data: Path, out: Path, platform: Platform, answer_tokens: int
) -> None:
    """Answer all questions of ``data`` with the newest checkpoint of ``stage``; every process of the run calls this.

    Writes ``predictions.jsonl`` (one Prediction a line) and ``accuracy.json`` into ``out``. Questions that cannot be
    asked (``questions.py``), whose media are broken, or that do not fit into a pack, are left out, named and counted.
    Answers are on disk as they come: the same command after an interruption generates the others only.

    Raises UserError if ``answer_tokens`` is below 1 or leaves no room for a question, or if nothing can be asked.
    """
    layout = recipe.stage_layout(stage)
    if layout.vpp:
        raise UserError(f"evaluation runs without virtual pipeline stages; add stages.{stage.name}.layout.vpp=null")
    if not 1 <= answer_tokens < stage.pack_length:
        raise UserError(
            f"answers of {answer_tokens} tokens: at least 1, and less than the pack_length={stage.pack_length} of "
            f"stage '{stage.name}'"
        )
    # Questions are encoded pack by pack where they are embedded; checkpoints of spread encoders load there as well.
    layout = replace(layout, encoder="tensor", encoder_chunk=None)
    checkpoint = _newest_checkpoint(recipe, stage, run_folder)
    groups = initialise(layout, platform, timeout=timedelta(minutes=recipe.collective_timeout_minutes))
    try:
        tokenizer = recipe_tokenizer(recipe)
        questions, rejected = questions_of(iterate_samples(data))
        settings = recipe.data_settings(stage)
        shorter = replace(settings, pack_length=stage.pack_length - answer_tokens)
        prompts, broken = _prompts(questions, VisualPlanner(shorter, tokenizer))
        rejected |= broken
        if not prompts:
            first = next(iter(rejected.items()), ("", "the data set is empty"))
            raise UserError(f"{data}: none of {len(rejected)} questions can be asked; {first[0]}: {first[1]}")
        if groups.rank == 0:
            _say_what_is_not_asked(rejected, len(prompts))
        model = _load_model(recipe, checkpoint, layout, platform)
        run = {
            "checkpoint": str(checkpoint.resolve()),
            "data": dataset_identity(data),
            "answer_tokens": answer_tokens,
            "pack_length": stage.pack_length,
            "settings": repr(settings),
        }
        asking = _Asking(stage, model, tokenizer, groups, platform, answer_tokens, AnswerLog(out))
        answers = asking.ask(prompts, run)
        if groups.rank == 0:
            asked = [one.conversation for one in questions if one.conversation.id not in rejected]
            predictions = [_prediction(conversation, answers) for conversation in asked]
            longer = sum(len(tokenizer.encode(prediction.answer)) > answer_tokens for prediction in predictions)
            _write(out, predictions, rejected, answer_tokens, longer)
            asking.log.remove()
    finally:
        destroy()


def _newest_checkpoint(recipe: Recipe, stage: Stage, run_folder: RunFolder) -> Path:
    folder = run_folder.stage_checkpoints(stage.name)
    checkpoint = find_latest(folder)
    if checkpoint is None:
        raise UserError(f"stage '{stage.name}' has no checkpoint in {folder}")
    require_same_model(checkpoint, read_description(checkpoint), recipe.model.eagle())
    return checkpoint


def _load_model(recipe: Recipe, checkpoint: Path, layout: Layout, platform: Platform) -> EagleModel | Float16Module:
    models = build_chunks(recipe, layout, platform)
    if recipe.lora:
        require_adapters(checkpoint, read_description(checkpoint), load_base(base_checkpoint(recipe), models))
    load_weights(checkpoint, models, "adapters" if recipe.lora else "base")
    model = models[0].eval()
    return Float16Module(model.config, model).eval() if recipe.precision == "bf16" else model


Answers = dict[tuple[str, bool], Answer]


@dataclass(frozen=True)
class _Asking:
    """One process's part in answering. Answers are known by question id and whether the model could look."""

    stage: Stage
    model: EagleModel | Float16Module
    tokenizer: Tokenizer
    groups: Groups
    platform: Platform
    answer_tokens: int
    log: AnswerLog

    def ask(self, prompts: Sequence[Prompt], run: Mapping[str, Any]) -> Answers:
        """All answers, on rank 0; elsewhere those known to this process. run: what kept answers must belong to."""
        known = self._known(run)
        for looking, what in ((True, "with images"), (False, "blanked")):
            left = [prompt for prompt in prompts if (prompt.identity, looking) not in known]
            packs = pack_prompts(left, self.stage.pack_length, self.answer_tokens)
            own = packs[self.groups.dp_rank :: self.groups.dp_size]
            shown = own if looking else [[_blanked(prompt) for prompt in pack] for pack in own]
            for answers in self._generate(shown, what):
                known |= {(identity, looking): answer for identity, answer in answers.items()}
                if self.groups.is_reader:
                    self.log.append(self.groups.dp_rank, looking, answers)
        return self._gathered(known)

    def _generate(self, packs: Sequence[Sequence[Prompt]], what: str) -> Iterator[dict[str, Answer]]:
        progress = tqdm(packs, desc=f"answering, {what}", unit="pack", disable=self.groups.rank != 0)
        return generate(
            self.model,
            progress,
            self.tokenizer,
            self.groups,
            self.platform.device,
            pack_length=self.stage.pack_length,
            answer_tokens=self.answer_tokens,
        )

    def _known(self, run: Mapping[str, Any]) -> Answers:
        """What an interrupted evaluation has left, the same on every process; a disk that fails is everybody's."""
        message: list[Any] = [None]
        if self.groups.rank == 0:
            try:
                message = [self.log.open(run)]
            except OSError as error:
                message = [f"cannot write answers to {self.log.folder}: {error.strerror}"]
        dist.broadcast_object_list(message, src=0)
        if isinstance(message[0], str):
            raise UserError(message[0])
        known: Answers = message[0]
        if known and self.groups.rank == 0:
            print(f"{len(known)} answers of an interrupted evaluation are kept", flush=True)
        return known

    def _gathered(self, known: Answers) -> Answers:
        if self.groups.dp_size == 1 or not self.groups.is_reader:
            return known
        parts: list[Answers] = [{}] * self.groups.dp_size
        dist.all_gather_object(parts, known, group=self.groups.dp)
        return {key: answer for part in parts for key, answer in part.items()}


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


def _prompts(questions: Sequence[StoredSample], planner: VisualPlanner) -> tuple[list[Prompt], dict[str, str]]:
    """(what can be asked, reasons why the others cannot by their ids), cut as in training."""
    prompts: list[Prompt] = []
    rejected: dict[str, str] = {}
    for question in questions:
        try:
            segment, plan = tokenise(question, planner, prompt=True)
            segment = add_tiles(segment, question, plan, planner.settings)
        except BrokenSample as reason:
            rejected[question.conversation.id] = str(reason)
            continue
        tokens, slots = segment.tokens.tolist(), segment.tile_slots.tolist()
        prompts.append(Prompt(segment.sample_id, tokens, segment.tiles, slots))
    return prompts, rejected


def _blanked(prompt: Prompt) -> Prompt:
    return replace(prompt, tiles=torch.full_like(prompt.tiles, BLANK_GREY))


def read_predictions(folder: Path) -> list[Prediction]:
    """The predictions that ``evaluate`` wrote into ``folder``."""
    lines = (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
    return [Prediction(**json.loads(line)) for line in lines]


def _write(
    out: Path, predictions: Sequence[Prediction], rejected: Mapping[str, str], answer_tokens: int, longer: int
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
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions)
        (out / PREDICTIONS).write_text(text, encoding="utf-8")
        (out / ACCURACY).write_text(json.dumps(accuracy, indent=1) + "\n", encoding="utf-8")
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
