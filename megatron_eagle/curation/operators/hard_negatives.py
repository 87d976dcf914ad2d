"""Keeps what is hard for a trained model, by what ``evaluate`` wrote: wrong answers, or the loss of every sample.

Evaluate a model on the built data set first; its ids are those of the samples here.
"""

import hashlib
import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Count, Flag, NotNegative, Share
from megatron_eagle.curation.operator import Row, SetOperator, Verdict
from megatron_eagle.curation.sample import Finding, Sample
from megatron_eagle.errors import UserError


@dataclass(frozen=True, config=STRICT)
class Operator(SetOperator):
    """file: ``predictions.jsonl`` or ``losses.jsonl``, of all sources or, by their names, of each (``{charts: FILE}``).
    How hard a sample is: the share of its questions that were answered wrong, or its loss. Wrong is what is not the
    same text as the answer but for spaces around it.

    how: ``keep`` those of at least ``least``; ``select`` the hardest ``share`` of each source; ``weigh``: draw that
        share with chances in proportion to how hard they are, by ``seed`` and id.
    most: harder ones are left, since a loss that high rather tells of a wrong answer; null: none.
    unknown: whether samples that the file does not have stay.
    """

    holds: ClassVar[int] = 300

    file: str | dict[str, str]
    how: Literal["keep", "select", "weigh"] = "keep"
    least: NotNegative = 0.5
    share: Share = 0.5
    most: NotNegative | None = None
    unknown: Flag = True
    seed: Count = 0

    def prepare(self, folder: Path) -> None:
        """UserError if a file is not there or is something else."""
        for file in self._files().values():
            hardness_of(file, ())

    def value(self, sample: Sample) -> Any:
        """Nothing but that it takes part."""
        return True

    def decide(self, rows: Iterator[Row]) -> Iterator[Verdict]:
        """What is not hard enough is left."""
        by_source: dict[str, list[Row]] = {}
        for row in rows:
            by_source.setdefault(row.key[0], []).append(row)
        for own, known in self._known(by_source):
            ranked: list[tuple[Row, float]] = []
            for row in own:
                if row.id not in known:
                    decision: Literal["noted", "left"] = "noted" if self.unknown else "left"
                    yield Verdict(row.key, Finding(decision, "how hard it is is not known"))
                elif self.most is not None and known[row.id] > self.most:
                    yield self._verdict(row, "left", "harder than a right answer would be", known[row.id])
                else:
                    ranked.append((row, known[row.id]))
            kept = self._kept(ranked)
            for row, hard in ranked:
                if row.key in kept:
                    yield self._verdict(row, "noted", "hard enough", hard)
                else:
                    yield self._verdict(row, "left", "not hard enough" if self.how != "weigh" else "not drawn", hard)

    def check(self, categories: Mapping[str, str], benchmarks: Sequence[str]) -> None:
        """ValueError if a file is of a source that there is not."""
        if isinstance(self.file, dict) and (not self.file or not self.file.keys() <= categories.keys()):
            raise ValueError(f"file is of the sources {sorted(self.file)}; there are {sorted(categories)}")

    def _files(self) -> dict[str, Path]:
        """By source, or of all under an empty name."""
        files = {"": self.file} if isinstance(self.file, str) else self.file
        return {name: Path(file) for name, file in files.items()}

    def _known(self, by_source: Mapping[str, list[Row]]) -> Iterator[tuple[list[Row], dict[str, float]]]:
        """Each source's samples with how hard those are that are known; UserError if a file cannot tell them apart."""
        files = self._files()
        if "" not in files:
            for name, own in by_source.items():
                yield own, hardness_of(files[name], {row.id for row in own}) if name in files else {}
            return
        places: dict[str, str] = {}
        known = hardness_of(files[""], {row.id for own in by_source.values() for row in own})
        for name, own in by_source.items():
            for row in own:
                if row.id in known and places.setdefault(row.id, name) != name:
                    raise UserError(
                        f"operator 'hard_negatives': the sources '{places[row.id]}' and '{name}' both have a sample "
                        f"'{row.id}', and {self.file} does not say whose it is; give each its file ({{{name}: FILE}})"
                    )
        for own in by_source.values():
            yield own, known

    def _verdict(self, row: Row, decision: Literal["noted", "left"], reason: str, hard: float) -> Verdict:
        return Verdict(row.key, Finding(decision, reason, scores={"hard": round(hard, 6)}))

    def _kept(self, own: list[tuple[Row, float]]) -> set[tuple[str, int]]:
        if self.how == "keep":
            return {row.key for row, hard in own if hard >= self.least}
        many = math.ceil(self.share * len(own))
        if self.how == "select":
            ranked = sorted(own, key=lambda one: (-one[1], one[0].key))
        else:
            ranked = sorted(((row, hard) for row, hard in own if hard > 0), key=lambda one: self._turn(*one))
        return {row.key for row, _ in ranked[:many]}

    def _turn(self, row: Row, hard: float) -> tuple[float, tuple[str, int]]:
        """When a sample is drawn: the first so many of these are a weighted draw without putting back (Efraimidis and
        Spirakis 2006)."""
        digest = hashlib.blake2b(f"{self.seed}/{row.key[0]}/{row.id}".encode(), digest_size=8).digest()
        return -math.log((int.from_bytes(digest) + 1) / 2**64) / hard, row.key


def hardness_of(file: Path, samples: Container[str]) -> dict[str, float]:
    """How hard each sample is by its id; UserError if a line is neither a prediction nor a loss.

    samples: ids that there are; ``<id>#<number>`` is a question of a conversation with several if it is none of them.
    """
    found: dict[str, list[float]] = {}
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    identity, hard = _entry(line, f"{file}, line {number}", samples)
                    found.setdefault(identity, []).append(hard)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"operator 'hard_negatives' reads what 'megatron-eagle evaluate' writes; {file} cannot be read: {why}"
        ) from None
    if not found:
        raise UserError(f"operator 'hard_negatives': {file} is empty")
    return {identity: sum(values) / len(values) for identity, values in found.items()}


def _entry(line: str, where: str, samples: Container[str]) -> tuple[str, float]:
    """Id of the sample and how hard this line finds it."""
    try:
        entry = json.loads(line)
        identity = entry["id"]
        if "loss" in entry:
            hard = float(entry["loss"])
        else:  # a question of a conversation with several answers is <id>#<number>
            hard = float(entry["prediction"].strip() != entry["answer"].strip())
            before, _, number = identity.rpartition("#")
            identity = before if before and number.isdecimal() and identity not in samples else identity
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"operator 'hard_negatives': {where} is neither a prediction nor a loss: {line[:80]!r}"
        ) from None
    if not isinstance(identity, str) or not math.isfinite(hard):
        raise UserError(f"operator 'hard_negatives': {where} has the id {identity!r} and is {hard} hard")
    return identity, hard
