"""Precision and recall of every rule on planted faults: each operator alone, as it is by default, on all samples."""

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.curation.block import sample_of
from megatron_eagle.curation.operator import SampleOperator, make_operator
from megatron_eagle.curation.sample import Sample
from megatron_eagle.data.build.sources import RecordSource
from megatron_eagle.errors import BrokenSample

# Which planted kinds a rule is there for. ``read`` stands for the reader, which refuses records that fit no form.
FINDS = {
    "repetition": ("repeated_lines", "repeated_phrase"),
    "decimals": ("decimals",),
    "choices": ("no_such_option",),
    "yes_no": ("yes_no_number",),
    "counting": ("count_in_words",),
    "empty": ("empty",),
    "refusal": ("refusal",),
    "leak": ("leak",),
    "turn_order": ("role_order",),
    "language": ("language",),
    "image_size": ("small_image", "extreme_aspect"),
    "mentioned_images": ("missing_image",),
    "read": ("unshown_image", "missing_image", "empty"),
}


@dataclass(frozen=True)
class Score:
    """Samples of its kinds, samples it found, and those of them that were planted; found by kind."""

    planted: int
    found: int
    right: int

    @property
    def precision(self) -> float:
        return self.right / self.found if self.found else 1.0


def read_samples(path: Path, refused: dict[str, str]) -> Iterator[Sample]:
    """Samples that can be read; the others go into ``refused`` with their reasons."""
    for item in RecordSource(path).items(path.parent):
        try:
            yield sample_of(item, "planted", "general")
        except BrokenSample as error:
            refused[str(item.claimed_id)] = str(error)


def flagged(path: Path) -> dict[str, set[str]]:
    """Rule -> ids of the samples in which it found a fault."""
    refused: dict[str, str] = {}
    samples = list(read_samples(path, refused))
    found: dict[str, set[str]] = {"read": set(refused)}
    for rule in FINDS.keys() - {"read"}:
        operator = make_operator(rule, {})
        assert isinstance(operator, SampleOperator)
        operator.prepare(path.parent)
        found[rule] = {one.conversation.id for one, findings, _ in operator.run(samples) if findings}
    return found


def scores(planted: Mapping[str, str | None], found: Mapping[str, set[str]]) -> dict[str, Score]:
    """Of each rule: its precision."""
    return {
        rule: Score(
            sum(kind in kinds for kind in planted.values()),
            len(found[rule]),
            sum(planted[one] in kinds for one in found[rule]),
        )
        for rule, kinds in FINDS.items()
    }


def recalls(planted: Mapping[str, str | None], found: Mapping[str, set[str]]) -> dict[str, tuple[int, int]]:
    """Kind -> (planted, found by a rule that is there for it)."""
    by_kind: dict[str, set[str]] = defaultdict(set)
    for name, kind in planted.items():
        if kind is not None:
            by_kind[kind].add(name)
    rules = {kind: [rule for rule, kinds in FINDS.items() if kind in kinds] for kind in by_kind}
    return {
        kind: (len(names), len(names & set().union(*(found[rule] for rule in rules[kind]))))
        for kind, names in by_kind.items()
    }


def table(planted: Mapping[str, str | None], found: Mapping[str, set[str]]) -> list[str]:
    """The table of docs/curation.md."""
    lines = ["| rule | planted | found | precision | recall by kind |", "|---|---|---|---|---|"]
    by_kind = recalls(planted, found)
    for rule, score in scores(planted, found).items():
        kinds = ", ".join(f"{kind} {by_kind[kind][1] / by_kind[kind][0]:.3f}" for kind in FINDS[rule])
        lines.append(f"| {rule} | {score.planted} | {score.found} | {score.precision:.3f} | {kinds} |")
    return lines


if __name__ == "__main__":
    from planted import write_planted

    with tempfile.TemporaryDirectory() as folder:
        size, seed = (int(one) for one in (sys.argv[1:] or ("20000", "7")))
        truth = write_planted(Path(folder), size, seed=seed)
        print("\n".join(table(truth, flagged(Path(folder) / "samples.jsonl"))))
