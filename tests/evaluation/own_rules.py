"""The rules of this project under the names and with the arguments of ``official_cases``."""

from collections.abc import Callable
from typing import Any

from megatron_eagle.evaluation.scores.anls import anls
from megatron_eagle.evaluation.scores.boxes import box_iou, read_box
from megatron_eagle.evaluation.scores.containment import contains_reference
from megatron_eagle.evaluation.scores.mathvista import mathvista
from megatron_eagle.evaluation.scores.mmmu import mmmu_open, mmmu_option
from megatron_eagle.evaluation.scores.multiple_choice import chosen_option, circular_accuracy
from megatron_eagle.evaluation.scores.relaxed import relaxed_accuracy
from megatron_eagle.evaluation.scores.spans import read_span, span_iou
from megatron_eagle.evaluation.scores.vqa import vqa_accuracy
from megatron_eagle.evaluation.scores.yes_no import YesNo, hallusion, yes_or_no


def circular(rows: list[list[Any]]) -> list[bool]:
    right = {index: chosen_option(answer, options) == wanted for index, options, wanted, answer in rows}
    return [verdict for _, verdict in sorted(circular_accuracy(right).items())]


def three(rows: list[list[Any]]) -> list[float]:
    found = hallusion(YesNo(right, kind, *index.split("_")[3:6]) for index, kind, right in rows)
    return [100 * share for share in (found.all_questions, found.figures, found.questions)]


def spans(answer: str, reference: list[float]) -> float:
    span = read_span(answer)
    return 100 * span_iou(reference, span) if span else 0.0


OWN: dict[str, Callable[..., Any]] = {
    "anls": anls,
    "relaxed": relaxed_accuracy,
    "vqa": vqa_accuracy,
    "containment": contains_reference,
    "multiple_choice": chosen_option,
    "circular": circular,
    "yes_no": yes_or_no,
    "hallusion": three,
    "mmmu_option": mmmu_option,
    "mmmu_open": mmmu_open,
    "boxes": lambda answer, reference: box_iou(reference, read_box(answer)),
    "spans": spans,
    "mathvista": lambda *case: bool(mathvista(*case)),
}
