"""What a finished run leaves: kept samples by source, the ledger, a blend, a summary and a page to look at.

One process writes all of it from the results of the blocks, in the order of the plan, so that nothing depends on who
worked on what. Media are not copied: ``kept/<source>/media`` is a link to the folder they lie in, which is how ``data
build`` finds them. What lies inside of tar files or records only is unpacked beside it, for kept samples alone.
"""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from megatron_eagle.curation.block import Result, Segment, read_result, segments
from megatron_eagle.curation.decisions import decision_folder, source_decisions
from megatron_eagle.curation.ledger import LEDGER_FILE, LedgerWriter
from megatron_eagle.curation.plan import Plan, PlannedSource
from megatron_eagle.curation.report import SHOWN, Example, write_report
from megatron_eagle.curation.sample import Sample
from megatron_eagle.data.build.forms.keys import HARMLESS
from megatron_eagle.data.build.shard_writer import write_atomically
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.errors import UserError

KEPT = "kept"
SAMPLES_FILE = "samples.jsonl"
SHARDS = "shards"
BLEND_FILE = "blend.yaml"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class SourceSummary:
    """What became of a source. gone: samples by (operator, decision). changed: turns by operator and reason.

    read = used + rejected + left. notes: what operators said of the source as a whole. files: of a folder or tars, that
    belong to no sample.
    """

    name: str
    category: str
    read: int
    used: int
    rejected: int
    left: int
    gone: dict[str, int]
    reasons: dict[str, int]
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.read != self.used + self.rejected + self.left:
            raise ValueError(
                f"source '{self.name}': {self.read} samples were read, {self.used} are used, {self.rejected} rejected, "
                f"{self.left} left"
            )


@dataclass(frozen=True)
class Summary:
    """What became of every source of a plan."""

    plan: str
    sources: tuple[SourceSummary, ...]

    def total(self, what: str) -> int:
        """The sum of ``read``, ``used``, ``rejected`` or ``left``."""
        return sum(getattr(source, what) for source in self.sources)


def write_output(plan: Plan, out: Path, state: Path, blocks: list[int]) -> Summary:
    """Writes everything into ``out`` from the results in ``state``; blocks: how many each source has.

    What a run that was killed here has left is written anew; when all is written, it is not touched again.
    """
    mark = state / "written.json"
    if mark.exists():
        return _summary(json.loads(mark.read_text(encoding="utf-8")))
    for left in out.iterdir():
        if left.name != state.name:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    cut = segments(plan)
    said = _notes(state, cut)
    summaries: list[SourceSummary] = []
    examples: list[Example] = []
    with LedgerWriter(out / LEDGER_FILE) as ledger:
        for number, source in enumerate(plan.sources):
            if source.benchmark:
                continue
            results = (_all_of(state, cut, number, block) for block in range(blocks[number]))
            notes = said[source.name]
            ledger.write(source.name, (note for _, note in notes))
            files = tuple(json.loads((state / f"read-{number}.json").read_text(encoding="utf-8"))["left"])
            writer = _SourceWriter(source, out / KEPT / source.name, ledger, examples)
            summaries.append(writer.write(results, tuple(text for text, _ in notes), files))
    summary = Summary(plan.name, tuple(summaries))
    _write_json(out / SUMMARY_FILE, asdict(summary))
    (out / BLEND_FILE).write_text(_blend(summary), encoding="utf-8")
    write_report(out, plan, summary, examples)
    write_atomically(mark, json.dumps(asdict(summary), ensure_ascii=False))
    return summary


def read_summary(out: Path) -> Summary:
    """That of a finished run; UserError."""
    path = out / SUMMARY_FILE
    try:
        return _summary(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no summary of a curation ({str(error)[:100]})") from None


def _summary(data: dict[str, Any]) -> Summary:
    lists = ("notes", "files")
    sources = ({**one, **{name: tuple(one[name]) for name in lists}} for one in data["sources"])
    return Summary(data["plan"], tuple(SourceSummary(**one) for one in sources))


def _all_of(state: Path, cut: list[Segment], source: int, block: int) -> Result:
    """All that a block has come to: rows and examples of all segments, the samples of the last."""
    results = [read_result(state, segment.number, source, block) for segment in cut]
    rows = [row for result in results for row in result.rows]
    rows += [
        {
            "number": sample["number"],
            "id": sample["record"]["id"],
            "operator": "",
            "final": True,
            "decision": "kept",
            "reason": "",
        }
        for sample in results[-1].samples
    ]
    rows.sort(key=lambda row: row["number"])  # stable: a sample's rows keep the order of the operators
    examples = [example for result in results for example in result.examples]
    return Result(rows, results[-1].samples, [], examples, results[0].read)


def _notes(state: Path, cut: list[Segment]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """What was said of each source as a whole, as text and as a row of the ledger."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for segment in cut:
        if segment.asks is not None:
            for name, finding in source_decisions(decision_folder(state, segment.number)):
                row = {key: finding[key] for key in ("decision", "reason", "detail", "scores")}
                text = f"{finding['reason']}: {finding['detail']}"
                found[name].append((text, {**row, "operator": segment.asks.operator.name}))
    return found


@dataclass
class _SourceWriter:
    source: PlannedSource
    folder: Path
    ledger: LedgerWriter
    examples: list[Example]

    def write(self, results: Iterable[Result], notes: tuple[str, ...], files: tuple[str, ...]) -> SourceSummary:
        """Writes one source's samples and rows, a block at a time."""
        self.folder.mkdir(parents=True)
        decisions: Counter[str] = Counter()
        gone: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        shown: Counter[tuple[str, str, str]] = Counter()
        read = 0
        with open(self.folder / SAMPLES_FILE, "w", encoding="utf-8") as file:
            for result in results:
                read += result.read
                self.ledger.write(self.source.name, result.rows)
                for row in result.rows:
                    if row["final"]:
                        decisions[row["decision"]] += 1
                        gone[row["operator"]] += row["decision"] != "kept"
                    if row["decision"] != "kept":
                        reasons[f"{row['operator']}: {row['reason']} ({row['decision']})"] += 1
                for example in result.examples:
                    reason = (example["operator"], example["decision"], example["reason"])
                    # Of each source, so that the report may choose among sources.
                    if shown[reason] < SHOWN or "rank" in example:
                        shown[reason] += 1
                        self.examples.append(Example(source=self.source.name, **example))
                for data in result.samples:
                    sample = Sample.from_json(data, self.source.name, self.source.category)
                    file.write(json.dumps(self._record(sample), ensure_ascii=False) + "\n")
        used, rejected, left = (decisions[name] for name in ("kept", "rejected", "left"))
        by_operator = {name: many for name, many in gone.items() if many}
        one = (self.source.name, self.source.category, read, used, rejected, left, by_operator)
        return SourceSummary(*one, dict(sorted(reasons.items())), notes, files)

    def _record(self, sample: Sample) -> dict[str, Any]:
        conversation = sample.conversation
        if self.source.ignore_keys:  # 'data build' would refuse what was ignored here
            known = {key: value for key, value in conversation.extra.items() if key in HARMLESS}
            conversation = replace(conversation, extra=known)
        numbers = count()
        names: dict[FileSlice, str] = {}
        for part, old in [
            *zip(sample.images, conversation.images, strict=True),
            *zip(sample.videos, conversation.videos, strict=True),
        ]:
            if part not in names:
                names[part] = self._refer(part, f"{sample.number:08d}-{next(numbers)}{Path(old).suffix[:6]}")
        return conversation.to_record([names[part] for part in sample.images], [names[part] for part in sample.videos])

    def _refer(self, part: FileSlice, name: str) -> str:
        """The name of a medium from the folder of the kept samples: through the link, or of a file made here."""
        path, root = Path(str(part.path)).absolute(), self._root()
        if root is not None and part.offset == 0 and path.is_relative_to(root) and path.stat().st_size == part.size:
            link = self.folder / "media"
            if not link.is_symlink():
                link.symlink_to(root, target_is_directory=True)
            return f"media/{path.relative_to(root)}"
        (self.folder / "unpacked").mkdir(exist_ok=True)
        (self.folder / "unpacked" / name).write_bytes(part.read())
        return f"unpacked/{name}"

    def _root(self) -> Path | None:
        """The folder that the source's media lie in, if they are files."""
        records = self.source.records
        root = records.media_root or (records.path if records.path.is_dir() else records.path.parent)
        return root.absolute()


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _blend(summary: Summary) -> str:
    """The kept sources as a recipe's blend, each at the weight of its size; paths are where ``--build`` puts shards."""
    blend = [{"path": f"{SHARDS}/{one.name}", "weight": float(one.used)} for one in summary.sources if one.used]
    head = "# For a stage of a recipe: every kept sample equally often. Paths are relative to this file's folder.\n"
    return head + yaml.safe_dump({"blend": blend}, sort_keys=False)
