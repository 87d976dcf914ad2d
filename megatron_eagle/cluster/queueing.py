"""Puts a chain into Slurm's queue, all of it or nothing, and takes a run out of it again."""

import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_eagle.cluster import slurm
from megatron_eagle.cluster.script import JOBS
from megatron_eagle.cluster.submit import Chain
from megatron_eagle.config.recipe import recipe_as_yaml
from megatron_eagle.errors import UserError
from megatron_eagle.training.json_lines import warn
from megatron_eagle.training.run_events import append_event, append_events

LOCK = "submit.lock"  # in the folder of the scripts; empty


def submit_chain(chain: Chain) -> list[str]:
    """Write the scripts, have Slurm check each, and submit all or none; returns the jobs' numbers.

    Nothing starts before everything is queued and on record: the first job is held until then. So even ``kill -9``
    leaves no half of a chain that runs, only jobs that ``cancel_run`` finds.
    """
    with _alone(chain.jobs):
        return _submit_chain(chain)


def _submit_chain(chain: Chain) -> list[str]:
    active = slurm.queued_from(chain.jobs)
    ahead = _job_to_follow(chain, active)
    _write(chain)
    for link in chain.links:
        slurm.check(chain.script(link))
    jobs: list[str] = []
    with _signals_wait() as asked:
        try:
            for link in chain.links:
                jobs.append(slurm.submit(chain.script(link), jobs[-1] if jobs else ahead, held=not jobs))
                if asked:
                    raise KeyboardInterrupt
            entries = [
                {"stage": link.name, "job": job, "steps": link.stage.steps if link.stage else 0}
                | {"processes": link.processes, "patience": link.stage.patience if link.stage else None}
                | {"tokens": link.stage.batch * link.stage.pack_length if link.stage else 0}  # of a step
                for link, job in zip(chain.links, jobs, strict=True)
            ]
            append_events(chain.folder, "submitted", entries)
            slurm.release(jobs[0])
        except (UserError, OSError, KeyboardInterrupt) as error:
            _take_back(chain, jobs, set(active))
            if isinstance(error, OSError):
                raise UserError(f"cannot write {chain.folder}: {error.strerror}; nothing was submitted") from None
            raise
    return jobs


def cancel_run(run_folder: Path) -> list[slurm.Queued]:
    """Cancel all jobs of the run that are in the queue, and note it; UserError if there are none."""
    folder = run_folder.resolve()
    active = slurm.queued_from(folder / JOBS)
    if not active:
        raise UserError(f"no job of {folder} is in the queue")
    slurm.cancel(list(active))
    with suppress(OSError):  # on a full disk the jobs are cancelled all the same, and ``status`` finds them gone
        append_event(folder, "cancelled", jobs=list(active))
    return list(active.values())


def _job_to_follow(chain: Chain, active: dict[str, slurm.Queued]) -> str | None:
    """The queue's job of the stage before the chain's first; None if there is none, UserError for jobs in the way.

    Two jobs that train the same stage would overwrite each other's checkpoints, and those of later stages would start
    from what is being replaced.
    """
    order = [stage.name for stage in chain.recipe.stages]
    earlier = order[: order.index(chain.links[0].name)]
    in_the_way = [job for job in active.values() if job.name not in earlier]
    if in_the_way:
        numbers = " ".join(job.job for job in in_the_way)
        listed = ", ".join(map(str, in_the_way))
        raise UserError(f"{chain.folder} already has jobs in the queue: {listed}; end them first: scancel {numbers}")
    if active and (chain.jobs / "recipe.yaml").read_text(encoding="utf-8") != recipe_as_yaml(chain.recipe):
        listed = ", ".join(map(str, active.values()))
        raise UserError(f"job {listed} of {chain.folder} trains another recipe than this one; wait for its end")
    return next((job.job for job in active.values() if earlier and job.name == earlier[-1]), None)


@contextmanager
def _alone(jobs: Path) -> Iterator[None]:
    """UserError if another submission of the run is at work: each would find the queue empty, and write its scripts.

    A lock on a file in ``jobs``, which the kernel or the file server drops when its holder is dead. Where the file
    system has no locks (Lustre without ``flock``), that is said, and the operator has to keep them apart.
    """
    try:
        jobs.mkdir(parents=True, exist_ok=True)
        handle = os.open(jobs / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"cannot write {jobs}: {error.strerror}") from None
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # between nodes, too, where flock may be of one alone
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"another submission of {jobs.parent} is at work; nothing was submitted") from None
            warn(f"cannot lock {jobs / LOCK} ({error.strerror}): see to it that nobody else submits this run now")
        yield
    finally:
        os.close(handle)


@contextmanager
def _signals_wait() -> Iterator[list[int]]:
    """Signals that would end this process are only noted inside: those that came."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _take_back(chain: Chain, jobs: list[str], others: set[str]) -> None:
    """Cancel ``jobs`` and what of this chain is in the queue though sbatch did not come to say so."""
    try:
        found = set(jobs) | (slurm.queued_from(chain.jobs).keys() - others)
        slurm.cancel(sorted(found))
    except UserError as error:
        raise UserError(
            f"{error}; of {chain.folder} jobs may be left in the queue, where they wait and never start: "
            f"megatron-eagle cancel {chain.folder}"
        ) from None
    with suppress(OSError):  # a full disk may be why
        append_event(chain.folder, "cancelled", jobs=sorted(found))


def _write(chain: Chain) -> None:
    try:
        chain.jobs.mkdir(parents=True, exist_ok=True)
        (chain.jobs / "recipe.yaml").write_text(recipe_as_yaml(chain.recipe), encoding="utf-8")
        for link in chain.links:
            chain.script(link).write_text(link.text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {chain.jobs}: {error.strerror}") from None
