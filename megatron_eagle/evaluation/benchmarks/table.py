"""The benchmarks of Eagle 2's paper, one row each, and ``exact``, which is any file of questions with one right answer.

How each is asked is what NVlabs/Eagle's own lmms-eval tasks say (783f656, ``Eagle/lmms_eval/tasks``); MMStar and
RealWorldQA, which are not among them, are asked like those with options. Published values: the result tables of
NVlabs/Eagle's README of mid-2025 for Eagle 2, and table 3 of arXiv 2504.15271 for Eagle 2.5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_eagle.errors import UserError

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


def _published(*values: float | None) -> dict[str, float]:
    return {name: value for name, value in zip(PUBLISHED, values, strict=True) if value is not None}


BENCHMARKS: dict[str, Benchmark] = {
    row.name: row
    for row in (
        Benchmark("docvqa", "DocVQA", "anls", ("DocVQA",), PHRASE, answer_tokens=32, submission="rrc",
                  published=_published(81.8, 88.0, 92.6, 94.1)),
        Benchmark("chartqa", "ChartQA", "relaxed", ("ChartQA",), WORD,
                  published=_published(77.0, 82.0, 86.4, 87.5)),
        Benchmark("infovqa", "InfoVQA", "anls", ("InfoVQA", "InfographicVQA"), PHRASE, answer_tokens=32,
                  submission="rrc", published=_published(54.8, 65.8, 77.2, 80.4)),
        Benchmark("textvqa", "TextVQA", "vqa", ("TextVQA",), PHRASE, published=_published(76.6, 79.1, 83.0, 83.7)),
        Benchmark("ocrbench", "OCRBench", "containment", ("OCRBench",), answer_tokens=128, scale=1000,
                  published=_published(767, 818, 868, 869)),
        Benchmark("mmstar", "MMStar", "choice", ("MMStar",),
                  published=_published(48.5, 56.4, 62.6, 66.2)),
        Benchmark("realworldqa", "RealWorldQA", "choice", ("RealWorldQA",),
                  published=_published(55.4, 63.1, 69.3, 76.7)),
        Benchmark("ai2d", "AI2D", "choice", ("AI2D",), published=_published(70.9, 79.3, 83.9, 84.5)),
        Benchmark("mmmu", "MMMU", "mmmu", ("MMMU",), PHRASE, split="validation",
                  published=_published(38.8, 43.1, 56.1, 55.8)),
        Benchmark("mmbench", "MMBench 1.1", "circular", ("MMBench",), published=_published(None, None, 80.6, 81.7)),
        Benchmark("mmvet", "MMVet", "judge", ("MMVet", "MM-Vet"), answer_tokens=512,
                  published=_published(40.9, 53.8, 62.2, 62.9)),
        Benchmark("hallusionbench", "HallusionBench", "hallusion", ("HallusionBench",), answer_tokens=128,
                  pictures_only=True, published=_published(35.3, 45.8, 49.3, 54.7)),
        Benchmark("mathvista", "MathVista", "mathvista", ("MathVista",), options="", answer_tokens=512,
                  published=_published(45.3, 54.7, 63.8, 67.8)),
        Benchmark("exact", "exact matches", "exact", ("exact",), options=""),
    )
}  # fmt: skip


def find_benchmark(name: str) -> Benchmark:
    """The row ``name``; raises UserError with all names."""
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
