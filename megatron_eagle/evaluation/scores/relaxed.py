"""Relaxed accuracy, for ChartQA: numbers may be 5 % off.

Rule: arXiv 2203.10244, section 5.1, as pix2struct's ``metrics.py``, VLMEvalKit's ``vqa_eval.py`` and lmms-eval's
``tasks/chartqa/utils.py`` have it: "5%" is 0.05, and a reference of zero must be met in its very words.
"""

from collections.abc import Sequence

TOLERANCE = 0.05


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1.0 if ``answer``, without white space around it, is near enough to one of ``references``, else 0.0."""
    return float(any(_is_near(answer.strip(), reference) for reference in references))


def _is_near(answer: str, reference: str) -> bool:
    number, wanted = _number(answer), _number(reference)
    if number is None or not wanted:
        return answer.lower() == reference.lower()
    return abs(number - wanted) / abs(wanted) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
