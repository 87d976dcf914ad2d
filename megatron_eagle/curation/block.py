"""A block of samples through a segment of the plan, in whatever process; the result is one file, written whole.

A segment is the operators from one that needs all samples to the next: the findings of the first, which the engine has
decided by then, everything that looks at one sample at a time, and the value that the next one wants of each sample.
Operators that take up something else (a GPU) are a segment of their own, so that only they do.
A result depends on the block and the plan alone, so that blocks may be worked on in any order and done again.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_eagle.curation.operator import UNREADABLE, Resources, SampleOperator, SetOperator, Step
from megatron_eagle.curation.plan import Plan
from megatron_eagle.curation.sample import Finding, Sample, apply_findings, places_of
from megatron_eagle.data.build.shard_writer import write_atomically
from megatron_eagle.data.build.sources import Item, locate
from megatron_eagle.data.sample.conversation import Conversation, check_learned
from megatron_eagle.data.sample.markers import Kind
from megatron_eagle.errors import BrokenSample

_VARYING = re.compile(r"\S*\w\.\w\S*|\S*\d\S*")  # names of files, numbers
READ = "read"  # what the ledger calls the step before all operators
NOTHING_LEFT = "no answer is left"
EXAMPLES = 3  # kept of each reason in a block, for the report
MOST_SHOWN = 600  # characters of a turn in an example


@dataclass(frozen=True)
class Segment:
    """number: from 0. decided: whose findings come first, then those of ``steps``. asks: who decides at its end.

    resources: of each process that works on its blocks.
    """

    number: int
    decided: Step | None
    steps: tuple[Step, ...]
    asks: Step | None
    resources: Resources = Resources()


@dataclass(frozen=True)
class Job:
    """source, block: numbers from 0. items: of the source, in segment 0. findings: decided, by number of the sample."""

    source: int
    block: int
    items: tuple[Item, ...] = ()
    findings: Mapping[int, list[Finding]] = field(default_factory=dict)


@dataclass
class Result:
    """rows: of the ledger. samples: those that go on. values: (number, id, value) for the next decision. read: samples
    of the source in the block. examples: of samples that were changed or are gone."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    values: list[tuple[int, str, Any]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0


def segments(plan: Plan) -> list[Segment]:
    """The plan cut at operators that need all samples, and where operators take up something else."""
    found: list[Segment] = []
    decided: Step | None = None
    steps: list[Step] = []
    uses = Resources()

    def cut(asks: Step | None) -> None:
        nonlocal decided, steps
        found.append(Segment(len(found), decided, tuple(steps), asks, uses))
        decided, steps = asks, []

    for step in plan.steps:
        if step.operator.resources != uses:
            if steps or decided is not None:
                cut(None)
            uses = step.operator.resources
        if isinstance(step.operator, SetOperator):
            cut(step)
        else:
            steps.append(step)
    cut(None)
    return found


def result_file(state: Path, segment: int, source: int, block: int) -> Path:
    """Where the result of a block lies; it is there when the block is done."""
    return state / f"segment-{segment}-{source}-{block:06d}.json"


def read_result(state: Path, segment: int, source: int, block: int) -> Result:
    """The result of a finished block."""
    return Result(**json.loads(result_file(state, segment, source, block).read_text(encoding="utf-8")))


def run_block(plan: Plan, segment: Segment, job: Job, state: Path) -> None:
    """Takes a block through a segment and writes its result."""
    source = plan.sources[job.source]
    work = _Work(segment, source.name, Result(read=len(job.items)), dict(job.findings))
    if segment.number == 0:
        samples: Iterable[Sample] = work.read(job.items, source.category)
    else:
        before = read_result(state, segment.number - 1, job.source, job.block)
        samples = (Sample.from_json(data, source.name, source.category) for data in before.samples)
    work.take(list(samples))
    file = result_file(state, segment.number, job.source, job.block)
    write_atomically(file, json.dumps(asdict(work.result), ensure_ascii=False, allow_nan=False))


@dataclass
class _Work:
    segment: Segment
    source: str
    result: Result
    decided: dict[int, list[Finding]]
    shown: Counter[tuple[str, str]] = field(default_factory=Counter)

    def read(self, items: Iterable[Item], category: str) -> Iterable[Sample]:
        """Samples whose records are in order and whose media are there; the others are written down as rejected."""
        for item in items:
            try:
                yield sample_of(item, self.source, category)
            except BrokenSample as error:
                reason = _VARYING.sub("...", str(error).partition(": ")[0])  # by which reports count
                identity = str(item.claimed_id) if item.claimed_id is not None else _place_text(item.place)
                row = {"number": item.number, "id": identity, "operator": READ, "final": True, "decision": "rejected"}
                self.result.rows.append({**row, "reason": reason[:100], "detail": str(error)[:200]})

    def take(self, samples: list[Sample]) -> None:
        """All samples through the segment, a step at a time, for some steps work on many at once."""
        decided, asks = self.segment.decided, self.segment.asks
        if decided is not None and self.source in decided.sources:
            samples = self._applied(samples, decided, [self.decided.get(sample.number, []) for sample in samples])
        for step in self.segment.steps:
            if self.source in step.sources:
                assert isinstance(step.operator, SampleOperator)
                samples = self._applied(samples, step, step.operator.all_findings(samples))
        if asks is not None and self.source in asks.sources:
            samples = [left for sample in samples if (left := self._ask(sample, asks)) is not None]
        self.result.samples += [sample.to_json() for sample in samples]

    def _applied(self, samples: list[Sample], step: Step, found: Sequence[list[Finding]]) -> list[Sample]:
        after = (self._apply(sample, step, findings) for sample, findings in zip(samples, found, strict=True))
        return [sample for sample in after if sample is not None]

    def _ask(self, sample: Sample, step: Step) -> Sample | None:
        assert isinstance(step.operator, SetOperator)
        try:
            value = step.operator.value(sample)
        except BrokenSample as error:
            return self._apply(sample, step, [Finding("rejected", UNREADABLE, str(error)[:200])])
        if value is not None:
            self.result.values.append((sample.number, sample.conversation.id, value))
        return sample

    def _apply(self, sample: Sample, step: Step, findings: list[Finding]) -> Sample | None:
        """What an operator's findings make of a sample, each of them written down."""
        if not findings:
            return sample
        name = step.operator.name
        after = apply_findings(sample, findings, name, step.reject)
        whole = [one for one in findings if one.turn is None and one.decision in ("rejected", "left")]
        for finding in findings:
            if finding.decision == "noted" and not finding.reason:
                continue
            final = after is None and bool(whole) and finding is whole[0]
            self.result.rows.append(_row(sample, finding, name, final))
            self._show(sample, finding, name)
        if after is None and not whole:
            gone = Finding("rejected", NOTHING_LEFT if step.reject == "exchange" else "an answer is faulty")
            self.result.rows.append(_row(sample, gone, name, True))
        return after

    def _show(self, sample: Sample, finding: Finding, operator: str) -> None:
        """Keep the first few samples of each reason for the report."""
        if finding.beside is None:
            if finding.decision == "noted" or self.shown[operator, finding.reason] >= EXAMPLES:
                return
            self.shown[operator, finding.reason] += 1
        conversation: Conversation = sample.conversation
        around = range(len(conversation.turns))
        if finding.turn is not None:
            around = range(max(0, finding.turn - 2), min(finding.turn, len(conversation.turns)))
        turns = [
            (conversation.turns[number].role, conversation.turns[number].text[:MOST_SHOWN]) for number in around[:6]
        ]
        images = [*places_of(sample.images[:3]), *(finding.beside or ())]
        example: dict[str, Any] = {
            "operator": operator,
            "decision": finding.decision,
            "reason": finding.reason,
            "detail": finding.detail,
        }
        text = None if finding.text is None else finding.text[:MOST_SHOWN]
        example |= {"id": conversation.id, "turns": turns, "images": images, "text": text, "turn": finding.turn}
        if finding.beside is not None:
            example |= {"rank": next(iter(finding.scores.values()), 0.0), "gallery": finding.gallery}
        self.result.examples.append(example)


def _row(sample: Sample, finding: Finding, operator: str, final: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"number": sample.number, "id": sample.conversation.id, "operator": operator, "final": final}
    row |= {"decision": finding.decision, "reason": finding.reason, "detail": finding.detail}
    if finding.turn is not None:
        row["turn"] = finding.turn
    if finding.scores:
        row["scores"] = dict(finding.scores)
    if finding.text is not None and finding.turn is not None:
        changed = finding.decision == "changed"
        row |= {"before": sample.conversation.turns[finding.turn - 1].text if changed else None, "after": finding.text}
    return row


def sample_of(item: Item, source: str, category: str) -> Sample:
    """The sample of an item; BrokenSample with the reason that ``data build`` would give."""
    if not isinstance(item.content, Conversation):
        raise BrokenSample(item.content)
    if item.documents:
        raise BrokenSample("documents are not read here: 'data build' makes images of them, curate what it built")
    check_learned(item.content)
    kinds: tuple[Kind, ...] = ("image", "video")
    images, videos = (tuple(locate(item, name, kind) for name in item.content.names(kind)) for kind in kinds)
    return Sample(source, category, item.number, item.content, images, videos)


def _place_text(place: Mapping[str, Any]) -> str:
    """Stands in for the id of a record that has none."""
    return "@" + "-".join(f"{name}-{part}" for name, part in place.items())
