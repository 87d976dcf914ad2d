"""What a benchmark is: how it is asked and scored, and what was published of it. Each is a file of ``known/``.

How those of Eagle 2's paper are asked is what NVlabs/Eagle's own lmms-eval tasks say (783f656,
``Eagle/lmms_eval/tasks``); MMStar and RealWorldQA, which are not among them, are asked like those with options.
Published values: the result tables of NVlabs/Eagle's README of mid-2025 for Eagle 2, and table 3 of arXiv 2504.15271
for Eagle 2.5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Rule = Literal[
    "anls", "relaxed", "vqa", "containment", "choice", "circular", "mmmu", "hallusion", "mathvista", "judge", "exact"
]

PHRASE = "\nAnswer the question using a single word or phrase."
WORD = "\nAnswer the question with a single word."
LETTER = "\nAnswer with the option's letter from the given choices directly."
PUBLISHED = ("Eagle2-1B", "Eagle2-2B", "Eagle2-9B", "Eagle2.5-8B")
PUBLISHED_IN = "the README of NVlabs/Eagle of mid-2025 (Eagle 2) and arXiv 2504.15271, table 3 (Eagle 2.5)"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and how it is asked and scored.

    name: as it is asked for. files: beginnings of the names that its files have, those of VLMEvalKit first.
    ask: what stands behind every question with a free answer; options: what stands behind every one with
    options. answer_tokens: longest answer. scale: what a share of 1 is written as. pictures_only: questions without a
    picture are no part of the published number. split: the one that the published number is of, where a file says
    several. submission: form of the file for a server that has the answers.
    """

    name: str
    title: str
    rule: Rule
    files: tuple[str, ...]
    ask: str = ""
    options: str = LETTER
    answer_tokens: int = 16
    scale: int = 100
    pictures_only: bool = False
    split: str = ""
    submission: Literal["rrc"] | None = None
    published: Mapping[str, float] = field(default_factory=dict)


def published(*values: float | None) -> dict[str, float]:
    """The published values of the models of ``PUBLISHED``, in that order; None where there is none."""
    return {name: value for name, value in zip(PUBLISHED, values, strict=True) if value is not None}
