"""Runs a plan: blocks of samples over processes of this machine or of a Ray cluster, decisions and output in this one.

Every block's result is a file that is there whole or not at all, in a hidden folder beside the output. So a run that
was killed loses the blocks in flight and goes on where it was when the same command is given again, and the output is
the same bytes for any number of workers. Memory: the blocks in flight, and what operators that need all samples hold.
"""

import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from megatron_eagle.curation.block import Job, Result, Segment, read_result, result_file, segments
from megatron_eagle.curation.decisions import decided_of, decision_folder, write_decisions
from megatron_eagle.curation.operator import Row, SetOperator, Verdict
from megatron_eagle.curation.output import KEPT, SAMPLES_FILE, SHARDS, Summary, write_output
from megatron_eagle.curation.plan import Plan
from megatron_eagle.curation.processes import Processes
from megatron_eagle.curation.ray_cluster import LOCAL, RayCluster
from megatron_eagle.data.build.shard_writer import STATE_FOLDER, write_atomically
from megatron_eagle.data.build.sources import spool
from megatron_eagle.data.build.walk import Ledger
from megatron_eagle.errors import UserError
from megatron_eagle.progress import Progress

Engine = Literal["processes", "ray"]
Pool = Processes | RayCluster


def curate(
    plan: Plan,
    out: Path,
    *,
    workers: int = 1,
    build: bool = False,
    engine: Engine = "processes",
    ray_address: str = LOCAL,
) -> Summary:
    """Runs the plan; ``out`` appears whole when all is done.

    workers: processes at once. engine: where they are; a run that was begun with one may be continued with the other.
    ray_address: of the cluster (``RayCluster``). build: also build a data set of each source's kept samples, in
    ``out/shards``.

    Raises UserError if ``out`` holds something already, a source or what an operator needs is not there, another
    process runs the same, or what was begun is of another plan.
    """
    partial = out.parent / f".{out.name}.partial"
    state, finished = partial.absolute() / STATE_FOLDER, out.parent / f".{out.name}.finished"
    _take_up(finished, partial, state)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not empty; remove it or choose another folder")
    try:
        given = json.loads(json.dumps(plan.begun_with()))
        state.mkdir(parents=True, exist_ok=True)
        with _alone(state):
            for step in plan.steps:  # before anything is written down: what is refused here may be mended in the plan
                step.operator.prepare(state)
            _begin(given, state)
            pool = RayCluster(plan, state, workers, ray_address) if engine == "ray" else Processes(plan, state, workers)
            with pool:
                blocks = _run(plan, state, pool)
            summary = write_output(plan, partial, state, blocks)
            if build:
                _build(summary, partial, workers)
            os.replace(state, finished)
            if out.exists():
                out.rmdir()
            os.replace(partial, out)
            shutil.rmtree(finished)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"cannot curate into {out}: {error.strerror or error}{where}") from error
    return summary


def _take_up(finished: Path, partial: Path, state: Path) -> None:
    """Goes on where a run ended between its last block and its end.

    The state is moved out of the output in one step, and deleted once the output stands: a half-deleted one would be
    taken for an unfinished run.
    """
    try:
        if finished.exists():
            with _alone(finished):
                if partial.exists():
                    os.replace(finished, state)
                else:
                    shutil.rmtree(finished)
    except OSError as error:
        raise UserError(f"cannot go on with {finished}: {error.strerror or error}") from error


def _build(summary: Summary, out: Path, workers: int) -> None:
    from megatron_eagle.data.build.dataset import build_dataset  # Energon and torch, which nothing else here needs

    for source in summary.sources:
        if source.used and not (out / SHARDS / source.name).exists():
            (out / SHARDS).mkdir(exist_ok=True)
            kept = out / KEPT / source.name / SAMPLES_FILE
            build_dataset(kept, out / SHARDS / source.name, workers=workers)


def _begin(given: dict[str, Any], state: Path) -> None:
    """Writes down what is curated, or checks that what was begun is the same."""
    file = state / "begun.json"
    if not file.exists():
        write_atomically(file, json.dumps(given))
    begun = json.loads(file.read_text(encoding="utf-8"))
    changed = [name for name in given if begun.get(name) != given[name]]
    if changed:
        raise UserError(
            f"{state.parent} holds an unfinished run of something else ({', '.join(changed)} changed); "
            "remove it to start over"
        )


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """No two processes run into the same folder; the lock ends with its process."""
    with open(state / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is curating into {state.parent}") from None
        yield


def _run(plan: Plan, state: Path, pool: Pool) -> list[int]:
    """All segments; returns how many blocks each source has."""
    blocks: list[int] = []
    for segment in segments(plan):
        if segment.number == 0:
            blocks = [_read_source(plan, state, segment, number, pool) for number in range(len(plan.sources))]
        else:
            pool.run(segment, _later_jobs(plan, state, segment, blocks))
        if segment.asks is not None:
            _decide(plan, state, segment, blocks)
    return blocks


def _read_source(plan: Plan, state: Path, segment: Segment, number: int, pool: Pool) -> int:
    """Segment 0 of a source; returns its number of blocks."""
    source = plan.sources[number]
    mark = state / f"read-{number}.json"
    if mark.exists():
        return int(json.loads(mark.read_text(encoding="utf-8"))["blocks"])
    ledger = Ledger()
    bar = Progress(f"reading {source.name}", unit="samples")
    count = 0

    def jobs() -> Iterator[Job]:
        """Blocks that are not done. All records are parsed, also those of others: ids must differ throughout."""
        nonlocal count
        items = source.records.items(state / f"unpacked-{number}", ledger)
        while True:
            spooled = state / f"inline-{number}-{count:06d}"
            done = result_file(state, 0, number, count).exists()
            if not done:
                spooled.unlink(missing_ok=True)
            block = itertools.islice(items, plan.block)
            taken = tuple(block if done else spool(block, spooled))
            if not taken:
                return
            count += 1
            bar.update(len(taken))
            if not done:
                yield Job(number, count - 1, taken)

    with bar:
        pool.run(segment, jobs())
    left = {"files": ledger.files, "left": ledger.lines()}
    write_atomically(mark, json.dumps({"blocks": count, **left}))
    return count


def _later_jobs(plan: Plan, state: Path, segment: Segment, blocks: list[int]) -> Iterator[Job]:
    folder = decision_folder(state, segment.number - 1)
    for number, source in enumerate(plan.sources):
        for block in range(blocks[number]):
            if not result_file(state, segment.number, number, block).exists():
                decided = decided_of(folder, source.name, block) if segment.decided is not None else {}
                yield Job(number, block, (), decided)


def _decide(plan: Plan, state: Path, segment: Segment, blocks: list[int]) -> None:
    """Asks the operator at the end of a segment, once all blocks have come to it."""
    folder = decision_folder(state, segment.number)
    if folder.exists() or segment.asks is None:
        return
    operator = segment.asks.operator
    assert isinstance(operator, SetOperator)
    verdicts = operator.decide(_rows(plan, state, segment, blocks))
    write_decisions(folder, (_checked(verdict, operator) for verdict in verdicts), plan.block)


def _checked(verdict: Verdict, operator: SetOperator) -> Verdict:
    if verdict.key[1] is None and verdict.finding.decision != "noted":
        raise ValueError(f"operator '{operator.name}' says of a whole source that it is {verdict.finding.decision}")
    return verdict


def _rows(plan: Plan, state: Path, segment: Segment, blocks: list[int]) -> Iterator[Row]:
    for number, source in enumerate(plan.sources):
        for block in range(blocks[number]):
            result: Result = read_result(state, segment.number, number, block)
            for key, identity, value in result.values:
                yield Row((source.name, key), identity, source.category, value, source.benchmark)
