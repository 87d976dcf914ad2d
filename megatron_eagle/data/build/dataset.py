"""Conversations, media with captions, or a WebDataset -> a checked data set of Energon WebDataset shards.

What training would stumble over is found here, once: every record is parsed, every image really decoded, every video
opened and its first and last frame decoded, and each bad sample is written to ``rejected.jsonl`` with its place and
reason. The same input gives the same bytes, for any number of processes and parts.

The source is cut into blocks of samples, one shard each. Finished shards lie in a hidden folder beside the destination
until all are there. So a build that was killed goes on where it was, and several machines can build one data set: part
i of n takes every n-th block, ``join`` indexes what all of them made. The data set appears whole or not at all.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Collection, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_eagle.config.reading import MAX_PIXELS
from megatron_eagle.data.build.index import check_dataset, write_index
from megatron_eagle.data.build.part import Part
from megatron_eagle.data.build.shard_writer import (
    STATE_FOLDER,
    Block,
    ShardReport,
    build_shard,
    checksums_file,
    read_report,
    shard_name,
    spool_file,
    write_atomically,
)
from megatron_eagle.data.build.sources import DEFAULT_PROMPT, RecordSource, spool
from megatron_eagle.data.build.walk import Ledger
from megatron_eagle.data.build.worker_pool import WorkerPool
from megatron_eagle.data.order.measuring import open_sample_index
from megatron_eagle.data.storage.checksums import write_checksums
from megatron_eagle.errors import UserError
from megatron_eagle.progress import Progress

REJECTED_FILE = "rejected.jsonl"
PLAN_FILE = f"{STATE_FOLDER}/build.json"
BLOCKS_AHEAD = 2  # of each worker, read but not yet built


@dataclass(frozen=True)
class BuildReport:
    """What became of a source: samples read (blank lines not counted), written, rejected; shards made.

    resumed: shards, of these, that an earlier run had finished. renamed: ids that repeat and were made unique by their
    place; renamed_first: one of them. files: what became of the files of a folder or a tar, None without any.
    """

    read: int
    written: int
    rejected: int
    shards: int
    resumed: int = 0
    renamed: int = 0
    renamed_first: str = ""
    files: "FileReport | None" = None


@dataclass(frozen=True)
class FileReport:
    """Files of a source: used, in rejected samples, or left; reasons: "count reason (first file)" of those left."""

    used: int
    rejected: int
    left: int
    reasons: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.used + self.rejected + self.left


def build_dataset(
    source: Path | str,
    out_dir: Path | str,
    *,
    media_root: Path | str | None = None,
    prompt: str = DEFAULT_PROMPT,
    max_rejected: int = 0,
    samples_per_shard: int = 1000,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    part: Part | None = None,
    ignore_keys: Collection[str] = (),
) -> BuildReport:
    """Builds ``out_dir`` from a file of records, a tar, or a folder of media, tar or Parquet files (``sources.py``).

    media_root: folder that a file's media paths start from, its own by default. Paths that lead out of it, absolute or
        by "..", are rejected, so that a downloaded file cannot pull in private pictures; links inside it are followed.
    prompt: the question that a mere caption answers.
    max_rejected: rejected samples that are put up with. With more, nothing is built but ``out_dir/rejected.jsonl``.
    samples_per_shard: samples of the source in a block, good or bad; a shard holds the good ones.
    max_pixels: larger images and frames are rejected as decompression bombs.
    workers: processes that read and decode; the shards are the same bytes for any number.
    part: build only this part; ``join_parts`` makes the data set when all are done.
    ignore_keys: keys of records that are left out though they are not understood; "all" for every such key.

    Raises UserError if too many samples are rejected, none is left, the output cannot be written, or ``out_dir``
    already holds something: a finished data set is never overwritten.
    """
    if workers < 1 or samples_per_shard < 1:
        raise UserError(f"workers={workers} and samples_per_shard={samples_per_shard} must be at least 1")
    given = RecordSource(Path(source), None if media_root is None else Path(media_root), prompt, frozenset(ignore_keys))
    own, out = part or Part(), Path(out_dir)
    _check_output(out)
    unfinished = _unfinished(out)
    with _explained(f"cannot build {out} from {source}"):
        plan = {**given.describe(), "samples_per_shard": samples_per_shard, "max_pixels": max_pixels}
        _begin(unfinished, {**plan, "parts": own.parts})
        with _alone(unfinished, own):
            report = _build_part(given, unfinished, own, samples_per_shard, max_pixels, workers)
        return report if part is not None else _finish(out, max_rejected, report.resumed, keep=False)


def join_parts(out_dir: Path | str, *, max_rejected: int = 0) -> BuildReport:
    """Makes one data set of the parts that were built for ``out_dir``; raises UserError if one is missing."""
    out = Path(out_dir)
    _check_output(out)
    with _explained(f"cannot join the parts of {out}"):
        return _finish(out, max_rejected, 0, keep=True)


def _unfinished(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


@contextlib.contextmanager
def _explained(failed: str) -> Iterator[None]:
    """Says which file the operating system would not read or write."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{failed}: {error.strerror or error}{where}") from error


def _check_output(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder")
    if out.is_dir() and any(path.name != REJECTED_FILE for path in out.iterdir()):
        raise UserError(f"{out} already exists and is not empty; remove it or choose another folder")


def _begin(unfinished: Path, plan: dict[str, Any]) -> None:
    """Writes down what is built, or checks that what was begun is the same."""
    file = unfinished / PLAN_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    plan = json.loads(json.dumps(plan))
    if not file.exists():
        write_atomically(file, json.dumps(plan))
    begun = json.loads(file.read_text(encoding="utf-8"))
    changed = [f"{name} was {begun.get(name)!r}, is {plan[name]!r}" for name in plan if begun.get(name) != plan[name]]
    if changed:
        raise UserError(
            f"{unfinished} holds an unfinished build of something else: {'; '.join(changed)}; remove it to start over"
        )


@contextlib.contextmanager
def _alone(unfinished: Path, part: Part) -> Iterator[None]:
    """No two processes build the same part; the lock ends with its process."""
    with open(unfinished / STATE_FOLDER / f"part-{part.number}.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is building part {part.number}/{part.parts} in {unfinished}") from None
        yield


def _part_file(unfinished: Path, part: Part) -> Path:
    return unfinished / STATE_FOLDER / f"part-{part.number}-of-{part.parts}.json"


def _build_part(
    source: RecordSource,
    unfinished: Path,
    part: Part,
    samples_per_shard: int,
    max_pixels: int,
    workers: int,
) -> BuildReport:
    """Builds every block of a part that is not finished yet, and leaves a mark when all are."""
    bar = Progress(
        f"building from {source.path.name}",
        total=source.size(),
        unit="B" if source.size() else "samples",
    )
    reports: list[ShardReport] = []
    resumed = 0
    ledger = Ledger()
    scratch = unfinished / STATE_FOLDER / f"unpacked-{part.number}"

    def due() -> Iterator[Block]:
        """Blocks to build. All records are parsed, also those of other parts: ids must differ throughout."""
        nonlocal resumed
        items = source.items(scratch, ledger)
        for number in itertools.count():
            finished, own = read_report(unfinished, number), number % part.parts == part.number - 1
            spooled = spool_file(unfinished, number)
            if own and finished is None:
                spooled.unlink(missing_ok=True)
                block = Block(number, tuple(spool(itertools.islice(items, samples_per_shard), spooled)))
            else:
                dropped = (replace(item, inline={}) for item in itertools.islice(items, samples_per_shard))
                block = Block(number, tuple(dropped))
            if not block.items:
                return
            if not own:
                bar.update(block.weight)
            elif finished is not None:
                reports.append(finished)
                resumed += finished.written > 0
                bar.update(block.weight)
            else:
                yield block

    with bar, contextlib.closing(_build_all(due(), unfinished, max_pixels, workers)) as built:
        for block, report in built:
            reports.append(report)
            bar.update(block.weight)
    left = {
        "files": ledger.files,
        "shared": ledger.shared,
        "left": sum(ledger.left.values()),
        "reasons": ledger.lines(),
    }
    write_atomically(_part_file(unfinished, part), json.dumps({**asdict(part), **left}))
    return _sum(reports, resumed)


def _build_all(
    blocks: Iterator[Block], folder: Path, max_pixels: int, workers: int
) -> Generator[tuple[Block, ShardReport], None, None]:
    """Builds blocks in this process, or in several, in the order in which they get finished."""
    if workers == 1:
        for block in blocks:
            yield block, build_shard(block, folder, max_pixels)
        return
    with WorkerPool(workers) as pool:
        running: dict[Future[ShardReport], Block] = {}
        try:
            for block in blocks:
                running[pool.submit(build_shard, block, folder, max_pixels)] = block
                if len(running) >= workers * BLOCKS_AHEAD:
                    yield from _finished(running, FIRST_COMPLETED)
            while running:
                yield from _finished(running, FIRST_COMPLETED)
        except BrokenProcessPool:
            numbers = ", ".join(str(block.number) for block in running.values())
            raise UserError(f"a process that builds one of the shards {numbers} was killed; out of memory?") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(running: dict[Future[ShardReport], Block], when: str) -> Iterator[tuple[Block, ShardReport]]:
    for future in wait(running, return_when=when).done:
        report = future.result()
        yield running.pop(future), report


def _sum(reports: list[ShardReport], resumed: int) -> BuildReport:
    rejected = sum(len(report.rejected) for report in reports)
    shards = sum(report.written > 0 for report in reports)
    renamed = sum(report.renamed for report in reports)
    first = next((report.renamed_first for report in reports if report.renamed), "")
    read, written = sum(report.read for report in reports), sum(report.written for report in reports)
    return BuildReport(read, written, rejected, shards, resumed, renamed, first)


def _file_report(reports: list[ShardReport], part_file: Path) -> FileReport | None:
    """Holds the files of all samples against those found; every part has found them all."""
    found = json.loads(part_file.read_text(encoding="utf-8"))
    if not found["files"]:
        return None
    used = found["shared"] + sum(report.files for report in reports)
    rejected = sum(report.files_rejected for report in reports)
    made = FileReport(used, rejected, found["left"], tuple(found["reasons"]))
    if made.total != found["files"]:
        raise RuntimeError(
            f"{found['files']} files were found, {used} are used, {rejected} in rejected samples, {found['left']} left"
        )
    return made


def _finish(out: Path, max_rejected: int, resumed: int, keep: bool) -> BuildReport:
    """Indexes and checks the shards of all parts, and lets the data set appear."""
    unfinished = _unfinished(out)
    try:
        plan = json.loads((unfinished / PLAN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{unfinished} holds no parts of a data set; 'data build --part i/n' makes them") from None
    every = [Part(number, plan["parts"]) for number in range(1, plan["parts"] + 1)]
    missing = [f"{part.number}/{part.parts}" for part in every if not _part_file(unfinished, part).exists()]
    if missing:
        raise UserError(f"{out} cannot be joined: part {', '.join(missing)} is missing or unfinished")
    numbers = sorted(int(path.stem.removeprefix("shard-")) for path in (unfinished / STATE_FOLDER).glob("shard-*.json"))
    reports = [report for number in numbers if (report := read_report(unfinished, number)) is not None]
    finished = [report.number for report in reports]
    if finished != list(range(len(numbers))):
        raise UserError(f"{unfinished}: finished blocks are {finished}, there must be {len(numbers)} in a row")
    with open(unfinished / REJECTED_FILE, "w", encoding="utf-8") as file:
        for entry in (entry for report in reports for entry in report.rejected):
            file.write(json.dumps({"file": plan["source"], **entry}) + "\n")
    total = replace(_sum(reports, resumed), files=_file_report(reports, _part_file(unfinished, every[0])))
    if total.rejected > max_rejected or not total.written:
        raise _refusal(total, max_rejected, plan["source"], unfinished, out, keep)
    write_index(unfinished, [shard_name(r.number) for r in reports if r.written])
    check_dataset(unfinished, total.written)
    good = [report.number for report in reports if report.written]
    write_checksums(unfinished, [(shard_name(number), checksums_file(unfinished, number)) for number in good])
    open_sample_index(unfinished)
    shutil.rmtree(unfinished / STATE_FOLDER)
    (out / REJECTED_FILE).unlink(missing_ok=True)
    if out.is_dir():
        out.rmdir()
    os.replace(unfinished, out)
    return total


def _refusal(report: BuildReport, allowed: int, source: str, unfinished: Path, out: Path, keep: bool) -> UserError:
    """Leaves the list of rejected samples behind, and what many machines have built; returns what to say."""
    out.mkdir(exist_ok=True)
    os.replace(unfinished / REJECTED_FILE, out / REJECTED_FILE)
    if not keep:
        shutil.rmtree(unfinished)
    listed = out / REJECTED_FILE
    if report.rejected > allowed:
        return UserError(
            f"{source}: {report.rejected} of {report.read} samples are bad and {allowed} are allowed "
            f"(--max-rejected); {listed} lists them"
        )
    return UserError(f"{source}: no usable sample in {report.read} lines, {report.rejected} rejected; see {listed}")
