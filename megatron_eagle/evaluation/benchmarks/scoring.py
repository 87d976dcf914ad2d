"""Answers to a benchmark's questions as one number, with what it is a share of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark
from megatron_eagle.evaluation.benchmarks.entry import Entry, Question
from megatron_eagle.evaluation.scores.anls import anls
from megatron_eagle.evaluation.scores.containment import contains_reference
from megatron_eagle.evaluation.scores.mathvista import mathvista
from megatron_eagle.evaluation.scores.mmmu import mmmu_open, mmmu_option
from megatron_eagle.evaluation.scores.multiple_choice import chosen_option, question_of_rotation
from megatron_eagle.evaluation.scores.relaxed import relaxed_accuracy
from megatron_eagle.evaluation.scores.vqa import vqa_accuracy
from megatron_eagle.evaluation.scores.yes_no import YesNo, hallusion, yes_or_no


@dataclass(frozen=True)
class Scored:
    """An entry with its answer. points: in [0, 1]; None if only a judge can tell, which counts as 0.

    asked: whether there is an answer.
    """

    entry: Entry
    answer: str
    points: float | None
    asked: bool = True


@dataclass(frozen=True)
class Result:
    """A benchmark's score and what it is of.

    value: on the benchmark's scale; None if answers are withheld. questions: what the value is a share of, asked +
    unreadable. undecided: questions that need a judge, which count as wrong. parts: further numbers, by their names.
    """

    benchmark: str
    value: float | None
    questions: int
    asked: int
    unreadable: int
    left_out: int
    undecided: int
    parts: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.asked + self.unreadable != self.questions:
            raise ValueError(f"{self.questions} questions are not {self.asked} asked + {self.unreadable} unreadable")


def points(benchmark: Benchmark, entry: Entry, question: Question, answer: str) -> float | None:
    """What an answer is worth by the benchmark's rule, in [0, 1]; None if only a judge can tell.

    ``question`` has references.
    """
    references = question.references
    match benchmark.rule:
        case "anls":
            return anls(" ".join(answer.split()), references)  # or an answer of white space would be near to anything
        case "relaxed":
            return relaxed_accuracy(answer, references)
        case "vqa":
            return vqa_accuracy(answer, references)
        case "containment":
            return contains_reference(answer, references, entry.category)
        case "exact":
            return float(answer.strip() in [reference.strip() for reference in references])
        case "choice" | "circular" if question.options:
            return float(chosen_option(answer, question.options) == references[0])
        case "choice" | "circular":  # RealWorldQA asks for a word here and there (lmms-eval's tasks/realworldqa)
            return float(answer.lower().strip().rstrip(".") == references[0].lower())
        case "mmmu" if question.options:
            return float(mmmu_option(answer, question.options) == references[0])
        case "mmmu":
            return float(mmmu_open(answer, references))
        case "hallusion":
            return float(yes_or_no(answer) == {"1": "Yes", "0": "No"}.get(references[0], references[0]))
        case "mathvista":
            right = mathvista(answer, references[0], entry.fields.get("answer_type", ""), question.options)
            return None if right is None else float(right)
        case _:
            return None


def score(benchmark: Benchmark, entries: Sequence[Entry], answers: Mapping[str, str]) -> tuple[Result, list[Scored]]:
    """The result, and every entry that counts. answers: by entry; one without an answer is unreadable."""
    counted = [entry for entry in entries if not _left_out(benchmark, entry)]
    withheld = _withheld(counted)
    scored = [_scored(benchmark, entry, answers, withheld) for entry in counted]
    return result_of(benchmark, scored, len(entries) - len(counted)), scored


def result_of(benchmark: Benchmark, scored: Sequence[Scored], left_out: int) -> Result:
    """The result of scored entries; left_out: entries that are none of the benchmark's."""
    withheld = _withheld([one.entry for one in scored])
    unreadable = sum(not one.asked for one in scored)
    undecided = 0 if withheld else sum(one.points is None for one in scored)
    value, parts = (None, {}) if withheld or not scored else _value(benchmark, scored)
    return Result(benchmark.name, value, len(scored), len(scored) - unreadable, unreadable, left_out, undecided, parts)


def _withheld(entries: Sequence[Entry]) -> bool:
    """Whether there are questions, and none has a reference."""
    questions = [entry.question for entry in entries if entry.question]
    return bool(questions) and not any(question.references for question in questions)


def _left_out(benchmark: Benchmark, entry: Entry) -> bool:
    if not entry.counts:
        return True
    return benchmark.pictures_only and entry.question is not None and not entry.question.pictures


def _scored(benchmark: Benchmark, entry: Entry, answers: Mapping[str, str], withheld: bool) -> Scored:
    if entry.question is None or entry.id not in answers:
        return Scored(entry, "", 0.0, asked=False)
    answer = answers[entry.id]
    return Scored(entry, answer, None if withheld else points(benchmark, entry, entry.question, answer))


def _value(benchmark: Benchmark, scored: Sequence[Scored]) -> tuple[float, dict[str, float]]:
    """(the value on the benchmark's scale, its parts)"""
    scale = benchmark.scale
    if benchmark.rule == "hallusion":
        found = hallusion(_of_hallusion(one) for one in scored)
        parts = {"aAcc": found.all_questions, "fAcc": found.figures, "qAcc": found.questions}
        return scale * found.mean, {name: scale * share for name, share in parts.items()}
    if benchmark.rule == "circular":
        groups: dict[str, list[Scored]] = {}
        for one in scored:
            groups.setdefault(_question_of(one.entry.id), []).append(one)
        whole = [all(one.points for one in group) for group in groups.values()]
        return scale * sum(whole) / len(whole), {"questions in all orders": float(len(whole))}
    return scale * _mean(scored), {name: scale * _mean(group) for name, group in _by_category(scored).items()}


def _question_of(identity: str) -> str:
    index = identity.split(" ")[0]  # of a row whose index was there already
    return str(question_of_rotation(int(index))) if index.isdigit() else identity


def _mean(scored: Sequence[Scored]) -> float:
    return sum(one.points or 0.0 for one in scored) / len(scored)


def _by_category(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.entry.category, []).append(one)
    return dict(sorted(groups.items())) if len(groups) > 1 else {}


def _of_hallusion(one: Scored) -> YesNo:
    """VLMEvalKit writes set, figure and question into the index, Hugging Face into columns of their own.

    Figures and questions are told apart by VLMEvalKit's ``l2-category``; without it by category and subcategory, as in
    HallusionBench's own ``utils.py``: there are figures of the same set and number in both categories.
    """
    fields, parts = one.entry.fields, one.entry.fields["index"].split("_")
    if len(parts) == 6:
        place = (fields.get("l2-category", f"{parts[0]}_{parts[1]}"), *parts[3:])
    else:
        kind = f"{one.entry.category}_{fields.get('subcategory', '')}"
        place = (kind, *(fields.get(name, "") for name in ("set_id", "figure_id", "question_id")))
    return YesNo(bool(one.points), *place)
