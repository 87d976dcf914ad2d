"""Slurm's own commands, each called in one place and its answer turned into a value or one clear line."""

import itertools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.errors import UserError

AWAY = ("Unable to contact slurm controller", "Socket timed out", "Zero Bytes were transmitted", "did not answer")
NOT_REACHED = "connect failure"  # then nothing can have been done, and any command may be given again
PATIENCE = 120.0  # seconds for which a controller that is away is asked again
_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)  # then the last for ever


class CannotAsk(UserError):
    """Slurm's controller does not answer: nothing is known of the queue."""


@dataclass(frozen=True)
class Partition:
    """nodes: how many it has; max_nodes: how many one job may have; max_seconds: how long it may run; accounts: whose
    jobs it takes. None: no limit."""

    name: str
    nodes: int
    max_nodes: int | None
    max_seconds: int | None = None
    accounts: tuple[str, ...] | None = None

    @property
    def largest_job(self) -> int:
        return self.nodes if self.max_nodes is None else min(self.nodes, self.max_nodes)


@dataclass(frozen=True)
class Queued:
    """A job in the queue. name: of its script without .sbatch; state, reason: Slurm's words."""

    job: str
    name: str
    state: str
    reason: str

    def __str__(self) -> str:
        return f"{self.job} ({self.name}, {self.state.lower()})"


def is_installed() -> bool:
    """Whether Slurm's commands are here, as on a login node."""
    return shutil.which("sbatch") is not None


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse variables that sbatch takes for options: they win over those in a script, which were checked."""
    if found := ", ".join(sorted(name for name in environment if name.startswith("SBATCH_"))):
        raise UserError(
            f"this shell sets {found}, with which sbatch would overrule the cluster profile: unset them here, and say "
            "it in the profile if it is meant"
        )


def partition(name: str | None) -> Partition:
    """What Slurm says of the partition, or of the default one; UserError if there is none of that name."""
    listed = _run("scontrol", "show", "partition", "--oneliner", *([name] if name else []))
    for line in listed.splitlines():
        facts = dict(part.split("=", 1) for part in line.split() if "=" in part)
        if name or facts.get("Default") == "YES":
            limit, time = facts.get("MaxNodes", "UNLIMITED"), facts.get("MaxTime", "UNLIMITED")
            accounts = facts.get("AllowAccounts", "ALL")
            return Partition(
                facts["PartitionName"],
                int(facts["TotalNodes"]),
                int(limit) if limit.isdigit() else None,
                seconds(time) if time != "UNLIMITED" else None,
                tuple(accounts.split(",")) if accounts != "ALL" else None,
            )
    raise UserError("Slurm has no default partition; name one in the cluster profile")


def seconds(time: str) -> int:
    """A time as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, last = (*parts, 0, 0)[:3]
    else:
        hours, minutes, last = (0, parts[0], 0) if len(parts) == 1 else (0, *parts) if len(parts) == 2 else parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + last


def gpus_of_nodes(partition: str) -> list[int]:
    """GPUs of each node of the partition, of whatever type."""
    listed = _run("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%G")
    return [
        sum(int(count) for count in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", line.partition("|")[2]))
        for line in dict.fromkeys(listed.splitlines())
    ]


def node_names(partition: str) -> set[str]:
    """All nodes of the partition."""
    return set(_run("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N").split())


def unusable_nodes(partition: str) -> dict[str, str]:
    """node -> its state and the reason that was given, of the partition's nodes that start no job at the moment."""
    listed = _run("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%T|%E")
    rows = [line.split("|", 2) for line in dict.fromkeys(listed.splitlines())]
    return {
        node: state + (f": {reason}" if reason != "none" else "")
        for node, state, reason in rows
        if state.startswith(("down", "drain", "fail", "error", "unknown"))
    }


def host_names(listed: Sequence[str]) -> set[str]:
    """The nodes of lists as Slurm writes them: n[1-3]."""
    return set(_run("scontrol", "show", "hostnames", ",".join(listed)).split()) if listed else set()


def check(script: Path) -> None:
    """Ask Slurm whether it would take the script; UserError says why not."""
    _run("sbatch", "--test-only", str(script))


def submit(script: Path, after: str | None, *, held: bool) -> str:
    """Submit the script, to start once job ``after`` has ended well and, if ``held``, is released; its number."""
    options = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    options += ["--hold"] if held else []
    return _run("sbatch", "--parsable", *options, str(script)).strip().split(";")[0]


def release(job: str) -> None:
    """Let a held job start."""
    _run("scontrol", "release", job)


def cancel(jobs: Sequence[str]) -> None:
    """Take the jobs back."""
    if jobs:
        _run("scancel", *jobs)


def queued_from(folder: Path) -> dict[str, Queued]:
    """job -> what is in the queue of the scripts in ``folder``, which is resolved; {} where Slurm is not installed."""
    if not is_installed():
        return {}
    listed = _run("squeue", "--noheader", "--me", "--sort=i", "--format=%i|%T|%r|%o")
    rows = [line.split("|", 3) for line in listed.splitlines()]
    scripts = [(job, state, reason, Path(command)) for job, state, reason, command in rows]
    return {
        job: Queued(job, path.stem, state, reason)
        for job, state, reason, path in scripts
        if path.parent.name == folder.name and path.parent.resolve() == folder
    }


def states(jobs: Sequence[str], *, patience: float = PATIENCE) -> dict[str, tuple[str, str]]:
    """job -> (state, Slurm's reason) of those that Slurm still has in its queue; CannotAsk after ``patience``."""
    if not jobs or not is_installed():
        return {}
    # A number that Slurm has forgotten makes squeue fail, so all of the user's jobs are listed instead.
    listed = _run("squeue", "--noheader", "--me", "--format=%i|%T|%r", patience=patience)
    rows = [line.split("|", 2) for line in listed.splitlines()]
    return {job: (state, reason) for job, state, reason in rows if job in jobs}


def _run(*command: str, patience: float = PATIENCE) -> str:
    """Output of a command. While the controller cannot be reached it is given again, for ``patience`` seconds.

    A question also when the answer was lost; what changes something may have been done by then.
    """
    is_question = command[0] in ("squeue", "sinfo") or command[1:2] in (("show",), ("--test-only",))
    deadline, pauses = time.monotonic() + patience, itertools.chain(_PAUSES, itertools.repeat(_PAUSES[-1]))
    while True:
        try:
            return _once(*command)
        except CannotAsk as error:
            pause = next(pauses)
            again = is_question or NOT_REACHED in str(error)
            if not again or time.monotonic() + pause > deadline:
                raise
            time.sleep(pause)


def _once(*command: str) -> str:
    # What a shell sets for its own look at the queue would hide jobs from us.
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SINFO_"))}
    try:
        result = subprocess.run(  # a session of its own: Ctrl-C is ours to answer
            command, capture_output=True, text=True, timeout=60, check=False, start_new_session=True, env=variables
        )
    except FileNotFoundError:
        raise UserError(f"'{command[0]}' is not installed here: give this command where Slurm's are") from None
    except subprocess.TimeoutExpired:
        raise CannotAsk(f"Slurm did not answer '{command[0]}' within 60 s") from None
    if result.returncode:
        words = re.sub(rf"^{command[0]}: (error: )?", "", " ".join(result.stderr.split())) or "no reason given"
        kind = CannotAsk if any(sign in words for sign in AWAY) else UserError
        raise kind(f"Slurm refuses '{' '.join(command)}': {words}")
    return result.stdout
