"""A data set on disk against what was built: which bytes rotted, which shard was cut off, exchanged, lost or added.

Training names a sample that cannot be read and goes on; a picture of noise it learns. So whoever copies a data set, or
keeps one on disks, can ask here, before weeks of training, or when a loss looks strange.
"""

import hashlib
import itertools
import sqlite3
import uuid
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.compat.energon import ShardIndex
from megatron_eagle.data.build.worker_pool import WorkerPool
from megatron_eagle.data.reports.shard_check import Advance, ShardFate, ShardTask, check_shard
from megatron_eagle.data.storage.checksums import ShardChecksums, open_checksums
from megatron_eagle.data.storage.shards import INDEX_FILE, dataset_identity, shard_counts
from megatron_eagle.errors import UserError
from megatron_eagle.progress import Progress

MOST_LISTED = 100
SHARDS_AHEAD = 2  # of each worker


@dataclass(frozen=True)
class DamageReport:
    """samples: due in so many shards; damaged: of these. findings: of all kinds, lines: the first MOST_LISTED of them.

    compared: shards that have checksums. doubts: media that decode with a warning, doubtful: the first of them.
    """

    samples: int
    shards: int
    damaged: int
    findings: int
    lines: tuple[str, ...]
    compared: int
    doubts: int
    doubtful: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The counts, in a line."""
        shards = "1 shard" if self.shards == 1 else f"{self.shards} shards"
        good = self.samples - self.damaged
        return f"{self.samples} samples in {shards}: {good} good, {self.damaged} damaged"


def check_damage(folder: Path, *, workers: int = 1) -> DamageReport:
    """Reads every byte of a data set in ``workers`` processes; raises UserError if it is none."""
    counts = shard_counts(folder)
    lines = _index_trouble(folder, sum(counts.values()))
    checksums: dict[str, ShardChecksums] = {}
    try:
        checksums = open_checksums(folder)
    except UserError as error:
        lines.append(f"checksums not used: {error}")
    tasks = [
        ShardTask(folder, name, number, count, checksums.get(name), MOST_LISTED)
        for number, (name, count) in enumerate(counts.items())
    ]
    bar = Progress(
        f"checking {folder.name}",
        total=sum(task.path.stat().st_size for task in tasks if task.path.exists()),
        unit="B",
    )
    with bar:
        fates = dict(_check_all(tasks, workers, bar.update))
    ordered = [fates[name] for name in counts]
    findings = len(lines) + sum(fate.findings for fate in ordered)
    lines += [f"{name}: {line}" for name, fate in zip(counts, ordered, strict=True) for line in fate.lines]
    rest = [*_shards_that_differ(folder, list(counts), checksums), *_identity_trouble(folder, ordered)]
    doubts = (f"{name}: {line}" for name, fate in zip(counts, ordered, strict=True) for line in fate.doubtful)
    return DamageReport(
        samples=sum(fate.samples for fate in ordered),
        shards=len(counts),
        damaged=sum(fate.damaged for fate in ordered),
        findings=findings + len(rest),
        lines=tuple([*lines, *rest][:MOST_LISTED]),
        compared=sum(task.checksums is not None for task in tasks),
        doubts=sum(fate.doubts for fate in ordered),
        doubtful=tuple(itertools.islice(doubts, MOST_LISTED)),
    )


def _check_all(tasks: Sequence[ShardTask], workers: int, advance: Advance) -> Iterator[tuple[str, ShardFate]]:
    """Checks in this process, or in several; each shard's fate by its name, in the order in which they get done."""
    if workers == 1:
        for task in tasks:
            yield task.name, check_shard(task, advance)
        return
    with WorkerPool(workers) as pool:
        running: dict[Future[ShardFate], ShardTask] = {}
        try:
            for task in tasks:
                running[pool.submit(check_shard, task)] = task
                if len(running) >= workers * SHARDS_AHEAD:
                    yield from _done(running, advance)
            while running:
                yield from _done(running, advance)
        except BrokenProcessPool:
            names = ", ".join(task.name for task in running.values())
            raise UserError(f"a process that checks one of {names} was killed; out of memory?") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _done(running: dict[Future[ShardFate], ShardTask], advance: Advance) -> Iterator[tuple[str, ShardFate]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        fate, task = future.result(), running.pop(future)
        advance(task.path.stat().st_size if task.path.exists() else 0)
        yield task.name, fate


def _index_trouble(folder: Path, promised: int) -> list[str]:
    """Whether Energon's index can be read at all, and has as many samples as it promises."""
    try:
        with ShardIndex(folder / INDEX_FILE) as index:
            found = index.count()
    except (sqlite3.Error, TypeError) as error:
        return [f".nv-meta/index.sqlite: cannot be read: {error}"]
    return [] if found == promised else [f".nv-meta/index.sqlite: has {found} samples, .info.json has {promised}"]


def _shards_that_differ(folder: Path, named: list[str], built: Collection[str]) -> list[str]:
    """Tar files of the folder, and shards that were built, which ``.info.json`` does not name."""
    known = set(named)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.tar") if path.is_file()}
    lines = [
        f"{name}: is no shard of this data set (.nv-meta/.info.json)" for name in sorted(present - known - set(built))
    ]
    return lines + [
        f"{name}: was built, and .nv-meta/.info.json does not have it" for name in sorted(set(built) - known)
    ]


def _identity_trouble(folder: Path, fates: Sequence[ShardFate]) -> list[str]:
    """Whether shards without checksums are, taken together, those of which ``index.uuid`` was made.

    ``energon prepare`` draws a random identity instead (RFC 4122, version 4), which says nothing of bytes.
    """
    digests = [fate.sha256 for fate in fates if fate.sha256 is not None]
    if len(digests) != len(fates):
        return []
    try:
        kept = uuid.UUID(dataset_identity(folder))
    except (UserError, ValueError) as error:
        return [f".nv-meta/index.uuid: cannot be read: {error}"]
    if kept.version == 4 or kept == uuid.UUID(bytes=hashlib.sha256(b"".join(digests)).digest()[:16]):
        return []
    return ["the shards together are not the bytes that were built, by the SHA-256 in .nv-meta/index.uuid"]
