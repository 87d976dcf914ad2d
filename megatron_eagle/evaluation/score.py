"""Scores a checkpoint: every question of a data set answered twice, with its images and with them blanked.

The blank run tells what the model can guess without looking; only the difference is sight. An answer counts when it
equals the reference after surrounding white space is removed, nothing softer.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.module import Float16Module
from tqdm import tqdm

from megatron_eagle.checkpoint.files import find_latest, load_weights, read_description, require_same_model
from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.sample.conversation import MARKER, VIDEO_MARKER, Conversation
from megatron_eagle.data.sample.tokenizer import Tokenizer, load_tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.shards import StoredSample, iterate_samples
from megatron_eagle.data.stream.encode import add_tiles, tokenise
from megatron_eagle.errors import BrokenSample, UserError
from megatron_eagle.evaluation.generate import Prompt, generate, pack_prompts
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.parallel.groups import Groups, destroy, initialise
from megatron_eagle.training.engine import build_chunks
from megatron_eagle.training.run_folder import RunFolder

PREDICTIONS = "predictions.jsonl"
ACCURACY = "accuracy.json"
BLANK_GREY = 128


@dataclass(frozen=True)
class Prediction:
    """One question, its reference answer, and the model's answers with the images and with them blanked."""

    id: str
    task: str
    question: str
    answer: str
    prediction: str
    blank_prediction: str

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

    Writes ``predictions.jsonl`` (one Prediction a line) and ``accuracy.json`` into ``out``. Questions whose media are
    broken, or that do not fit into a pack, are left out, named and counted.
    """
    layout = recipe.stage_layout(stage)
    if layout.vpp:
        raise UserError(f"evaluation runs without virtual pipeline stages; add stages.{stage.name}.layout.vpp=null")
    # Questions are encoded pack by pack where they are embedded; checkpoints of spread encoders load there as well.
    layout = replace(layout, encoder="tensor", encoder_chunk=None)
    groups = initialise(layout, platform, timeout=timedelta(minutes=recipe.collective_timeout_minutes))
    try:
        model = _load_model(recipe, stage, layout, run_folder, platform)
        tokenizer = load_tokenizer(recipe.tokenizer.kind, Path(recipe.tokenizer.path))
        questions = [question for sample in iterate_samples(data) for question in split_questions(sample)]
        settings = replace(recipe.data_settings(stage), pack_length=stage.pack_length - answer_tokens)
        prompts, rejected = _prompts(questions, VisualPlanner(settings, tokenizer))
        asked = [one.conversation for one in questions if one.conversation.id not in rejected]
        answers = _answer(stage, model, tokenizer, asked, prompts, groups, platform, answer_tokens)
        if groups.rank == 0:
            _write(out, answers, rejected)
    finally:
        destroy()


def _load_model(
    recipe: Recipe, stage: Stage, layout: Layout, run_folder: RunFolder, platform: Platform
) -> EagleModel | Float16Module:
    folder = run_folder.stage_checkpoints(stage.name)
    checkpoint = find_latest(folder)
    if checkpoint is None:
        raise UserError(f"stage '{stage.name}' has no checkpoint in {folder}")
    require_same_model(checkpoint, read_description(checkpoint), recipe.model.eagle())
    models = build_chunks(recipe, layout, platform)
    load_weights(checkpoint, models)
    model = models[0].eval()
    return Float16Module(model.config, model).eval() if recipe.precision == "bf16" else model


def _answer(
    stage: Stage,
    model: EagleModel | Float16Module,
    tokenizer: Tokenizer,
    asked: Sequence[Conversation],
    prompts: Sequence[Prompt],
    groups: Groups,
    platform: Platform,
    answer_tokens: int,
) -> list[Prediction]:
    """All predictions, in the order of the data set, on rank 0; an empty list elsewhere."""
    packs = pack_prompts(prompts, stage.pack_length, answer_tokens)[groups.dp_rank :: groups.dp_size]
    seen, blank = (
        generate(
            model,
            tqdm(chosen, desc=f"answering, {what}", unit="pack", disable=groups.rank != 0),
            tokenizer,
            groups,
            platform.device,
            pack_length=stage.pack_length,
            answer_tokens=answer_tokens,
        )
        for what, chosen in (("with images", packs), ("blanked", [[_blanked(p) for p in pack] for pack in packs]))
    )
    return _collect(asked, seen, blank, groups)


def split_questions(sample: StoredSample) -> list[StoredSample]:
    """One sample per answer of a conversation, holding the turns up to it; earlier answers are the reference's.

    A conversation with several answers gives ids ``<id>#1``, ``<id>#2``, ...
    """
    turns = sample.conversation.turns
    ends = [number for number, turn in enumerate(turns, 1) if turn.role == "assistant"]
    if len(ends) == 1:
        return [sample]
    questions = []
    for number, end in enumerate(ends, 1):
        images, videos = (sum(turn.text.count(kind) for turn in turns[:end]) for kind in (MARKER, VIDEO_MARKER))
        conversation = replace(
            sample.conversation,
            id=f"{sample.conversation.id}#{number}",
            turns=turns[:end],
            images=sample.conversation.images[:images],
            videos=sample.conversation.videos[:videos],
        )
        questions.append(StoredSample(conversation, sample.images[:images], sample.videos[:videos]))
    return questions


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


def _collect(
    conversations: Sequence[Conversation], seen: dict[str, str], blank: dict[str, str], groups: Groups
) -> list[Prediction]:
    if groups.dp_size > 1 and groups.is_reader:
        parts: list[tuple[dict[str, str], dict[str, str]]] = [({}, {})] * groups.dp_size
        dist.all_gather_object(parts, (seen, blank), group=groups.dp)
        seen = {identity: answer for part in parts for identity, answer in part[0].items()}
        blank = {identity: answer for part in parts for identity, answer in part[1].items()}
    if groups.rank != 0:
        return []
    return [
        Prediction(
            id=conversation.id,
            task=str(conversation.extra.get("task", "all")),
            question=[turn.text for turn in conversation.turns if turn.role == "user"][-1],
            answer=[turn.text for turn in conversation.turns if turn.role == "assistant"][-1],
            prediction=seen[conversation.id],
            blank_prediction=blank[conversation.id],
        )
        for conversation in conversations
    ]


def read_predictions(folder: Path) -> list[Prediction]:
    """The predictions that ``evaluate`` wrote into ``folder``."""
    lines = (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
    return [Prediction(**json.loads(line)) for line in lines]


def _write(out: Path, predictions: Sequence[Prediction], rejected: dict[str, str]) -> None:
    tasks: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        tasks.setdefault(prediction.task, []).append(prediction)
    accuracy = {
        "questions": len(predictions),
        "overall": _share([p.correct for p in predictions]),
        "blank_images": _share([p.blank_correct for p in predictions]),
        "rejected": rejected,
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
    for identity, reason in rejected.items():
        print(f"not asked: {identity}: {reason}")
    left_out = f" ({len(rejected)} could not be asked)" if rejected else ""
    print(f"{len(predictions)} questions{left_out}: {right:.1%} right, {blank:.1%} with blanked images")


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts) if verdicts else 0.0
