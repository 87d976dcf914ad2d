"""OCRBench: a reference somewhere in the answer.

Rule: VLMEvalKit's ``vlmeval/dataset/utils/ocrbench.py``. Case does not count, except in formulas, where white space
does not. (lmms-eval also takes full-width letters for plain ones since 0.7; published numbers are without that.)
"""

from collections.abc import Sequence

FORMULAS = "Handwritten Mathematical Expression Recognition"


def contains_reference(answer: str, references: Sequence[str], category: str = "") -> float:
    """1.0 if one of ``references`` is in ``answer``, else 0.0. category: OCRBench's, one of which is formulas."""
    plain = _formula if category == FORMULAS else _words
    return float(any(plain(reference) in plain(answer) for reference in references))


def _words(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
