"""Average normalised Levenshtein similarity, for DocVQA and InfographicVQA.

Rule: arXiv 1907.00490, with case and white space as in VLMEvalKit's ``vlmeval/dataset/utils/vqa_eval.py`` and
lmms-eval's ``api/metrics.py``: distances are between texts with single spaces, lengths those of the texts as they came.
VLMEvalKit after e8e78f05 takes the lengths of single-spaced texts, too; here benchmarks hand over such answers.
Both keep a similarity of exactly 0.5, which Megatron-LM's ``evaluate_vqav2.py`` does not.
"""

from collections.abc import Sequence

THRESHOLD = 0.5


def anls(answer: str, references: Sequence[str]) -> float:
    """Similarity in [0.5, 1] to the nearest of ``references``, 0 if none is that near. There is at least one."""
    similarity = 1 - min(_distance(reference, answer) for reference in references)
    return similarity if similarity >= THRESHOLD else 0.0


def _distance(reference: str, answer: str) -> float:
    # Upper case may be longer ("ß"), and is what the official length is taken of.
    length = max(len(reference.upper()), len(answer.upper()))
    return levenshtein(_plain(reference), _plain(answer)) / length if length else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def levenshtein(one: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of characters that make ``one`` of ``other``."""
    above = list(range(len(other) + 1))
    for row, character in enumerate(one, 1):
        line = [row]
        for column, letter in enumerate(other, 1):
            replaced = above[column - 1] + (character != letter)
            line.append(min(above[column] + 1, line[-1] + 1, replaced))
        above = line
    return above[-1]
