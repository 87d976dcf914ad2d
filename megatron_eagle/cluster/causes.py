"""Why a start of a stage's job ended, worked out from what it left: srun's words, its processes' words, their stacks.

What is shown is the first cause: what one process failed of by itself, not what the others say of losing it. Only a
death without a signal that asks for an end, or a hang, blames a node.
"""

import re
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.cluster.events import Outcome
from megatron_eagle.training.watchdog import (
    ASKED,
    HANG_EXIT_CODE,
    NON_FINITE_EXIT_CODE,
    SILENT,
    STACKS_FOLLOW,
    STOPPED_EXIT_CODE,
    SUSPENDED,
)

USER_ERROR = 2  # exit code of the command line after a UserError
BAD_NODE = 4  # exit code of ``megatron-eagle doctor``
FULL = {"No space left on device": "the disk is full", "Disk quota exceeded": "the quota is used up"}
STOP_NUMBERS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP_WORDS = tuple(signal.strsignal(number) or "" for number in STOP_NUMBERS)  # as srun says them, too
TRACEBACK = "Traceback (most recent call last):"
WAITING = "torch/distributed/"  # a process whose innermost call is there waits for others
_TASK = re.compile(r"^srun: error: (?P<node>[^:\s]+): tasks? (?P<ranks>[\d,\-]+): (?P<end>.+)$", re.MULTILINE)
_EXITED = re.compile(r"Exited with exit code (\d+)")
_COLLATERAL = re.compile(r"^srun: .*Terminating (StepId|job step)", re.MULTILINE)
_LABEL = re.compile(r"^\s*(\d+): (.*)$")  # of srun --label
_CONTACT = re.compile(r"lost contact|[Cc]onnection (closed|reset|refused)|Broken pipe|\bDist\w*Error|gloo|NCCL")
_AWAY = re.compile(
    r"^srun: error: .*(?:Unable to contact slurm controller|Socket timed out|Unable to create step).*", re.M
)
_STOOD = re.compile(rf"megatron-eagle: (rank \d+ {SUSPENDED} \d+ s)")
_OURS = re.compile(r"^(?:\s*\d+: )?(megatron-eagle: .+)$", re.MULTILINE)
_DOCTOR = re.compile(r"^(?:\s*\d+: )?megatron-eagle: bad node (?P<node>\S+): (?P<why>.+)$", re.MULTILINE)
_SILENT = re.compile(rf"^{SILENT}(.*)$", re.MULTILINE)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)')


@dataclass(frozen=True)
class Finding:
    """Why a start ended."""

    outcome: Outcome
    cause: str
    bad_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What srun said of tasks that ended badly: "0-1", a node, and how."""

    ranks: str
    node: str
    end: str

    @property
    def code(self) -> int | None:
        """The exit code; None after a signal."""
        exited = _EXITED.search(self.end)
        return int(exited[1]) if exited else None

    @property
    def is_stop(self) -> bool:
        """Ended by a signal that asks for an end: only somebody outside sends one."""
        return self.end.startswith(STOP_WORDS)

    @property
    def words(self) -> str:
        return f"rank {self.ranks} on node {self.node}: {self.end}"

    @property
    def all_ranks(self) -> list[int]:
        """Every rank of "0-1,5"."""
        parts = [part.split("-") for part in self.ranks.split(",")]
        return [rank for part in parts for rank in range(int(part[0]), int(part[-1]) + 1)]


def find_cause(code: int, asked: bool, log: str, stacks: dict[int, str]) -> Finding:
    """Why a start ended, from its exit code, its part of the log, and the stacks its processes left.

    The first cause: what a process failed of by itself comes before what it did to the others. stacks: rank -> text of
    its file; a rank that did not notice a hang has only the heading, "rank 3 on n2, ...".
    """
    if code == 0:
        return Finding("complete", "reached its end")
    for words, what in FULL.items():
        full = next((line.strip() for line in log.splitlines() if words in line), None)
        if full is not None:
            return Finding("refused", f"{what}: {full[-300:]}")
    if any(STACKS_FOLLOW in text for text in stacks.values()):
        return _hang(stacks)
    first, killed = _first_task(log), _killed_tasks(log)
    code = code if first is None or first.code is None else first.code
    stopped = Finding("stopped", "asked to stop (time limit, preemption or an operator)")
    if asked or code == STOPPED_EXIT_CODE or (first.is_stop if first else code - 128 in STOP_NUMBERS):
        return stopped
    doctor = list(dict.fromkeys(_DOCTOR.findall(log)))
    if doctor:
        cause = "; ".join(f"node {node}: {why}" for node, why in doctor)
        return Finding("failed", f"pre-flight: {cause}", tuple(sorted({node for node, _ in doctor})))
    said = [line for line in _OURS.findall(log) if not _CONTACT.search(line)]
    if code in (USER_ERROR, NON_FINITE_EXIT_CODE):
        mistake = f"exit code {code}: a mistake in the recipe or the arguments, or a loss that is no number"
        return Finding("refused", said[-1] if said else mistake)
    if code == HANG_EXIT_CODE:
        return Finding("failed", f"hang; {first.words if first else f'exit code {code}'}")
    if first is not None and first.code is None:
        return Finding("failed", first.words, (first.node,))
    if own := _own_failure(log):
        return Finding("failed", own)
    if killed:  # peers notice within milliseconds, and may be reported before the one that was killed
        return Finding("failed", "; ".join(task.words for task in ([first] if first else []) + killed))
    if any(task.code == STOPPED_EXIT_CODE for task in _tasks(log)) or ASKED in log:
        return stopped  # the peers of one that left may be reported before it, too
    return _of_the_others(code, first, log)


def _of_the_others(code: int, first: Task | None, log: str) -> Finding:
    """No process is known to have failed by itself."""
    if away := _AWAY.search(log):
        return Finding("interrupted", f"Slurm did not start the processes: {away[0]}")
    if stood := _STOOD.search(log):
        return Finding("interrupted", f"{stood[1]} (suspended), and contact was lost")
    lost = next((line for line in _OURS.findall(log) if _CONTACT.search(line)), None)
    what = first.words if first else f"exit code {code}"
    return Finding("failed", f"{what}; {lost}" if lost else what)


def _own_failure(log: str) -> str | None:
    """The last line of the earliest traceback that is not about another process, with its rank and node."""
    ranks: dict[str, list[str]] = {}
    earliest: dict[str, int] = {}
    for number, line in enumerate(log.splitlines()):
        found = _LABEL.match(line)
        rank, text = (found[1], found[2]) if found else ("", line)
        ranks.setdefault(rank, []).append(text)
        if text == TRACEBACK:
            earliest.setdefault(rank, number)
    nodes = {rank: task.node for task in _tasks(log) for rank in task.all_ranks}
    for rank in sorted(earliest, key=earliest.__getitem__):
        raised = _last_of_traceback(ranks[rank])
        if raised and not _CONTACT.search(raised):
            node = f" on node {nodes[int(rank)]}" if rank and int(rank) in nodes else ""
            return f"rank {rank}{node}: {raised[:300]}" if rank else raised[:300]
    return None


def _last_of_traceback(lines: list[str]) -> str | None:
    """The line that says what was raised, of the last traceback in a process's lines."""
    start = max(number for number, line in enumerate(lines) if line == TRACEBACK)
    return next((line for line in lines[start + 1 :] if line and not line.startswith((" ", "\t"))), None)


def _hang(stacks: dict[int, str]) -> Finding:
    """A process that cannot even write its stacks is the one that the others wait for; or one that stands elsewhere."""
    headings = {rank: text.split("\n", 1)[0].split(",")[0] for rank, text in stacks.items()}
    seen = [line.split() for text in stacks.values() for line in _SILENT.findall(text)]
    silent = {int(rank) for ranks in seen for rank in ranks} or {r for r in stacks if STACKS_FOLLOW not in stacks[r]}
    if silent:
        names = ", ".join(headings.get(rank, f"rank {rank}") for rank in sorted(silent))
        nodes = {headings[rank].rpartition(" on ")[2] for rank in silent if rank in headings}
        cause = f"hang: the others waited for {names} (no stack: stopped, or its node is gone)"
        return Finding("failed", cause, tuple(sorted(nodes)))
    places = {rank: _innermost(text) for rank, text in stacks.items()}
    busy = [rank for rank, place in sorted(places.items()) if WAITING not in place]
    if 0 < len(busy) < len(places) / 2:
        names = ", ".join(f"{headings[rank]} at {places[rank]}" for rank in busy)
        return Finding("failed", f"hang: the others waited for {names}")
    usual, count = Counter(places.values()).most_common(1)[0]
    odd = [rank for rank, place in sorted(places.items()) if place != usual]
    if odd and count > len(places) / 2:
        names = ", ".join(f"{headings[rank]} at {places[rank]}" for rank in odd)
        return Finding("failed", f"hang: {names}, all others at {usual}")
    return Finding("failed", f"hang: no step in time, stacks of all {len(stacks)} ranks are in the job's folder")


def _innermost(stacks: str) -> str:
    """Where the main thread stood: faulthandler writes it last, innermost call first."""
    main = stacks.rpartition("Thread 0x")[2]
    frame = _FRAME.search(main)
    if frame is None:
        return "an unknown place"
    file = frame["file"]
    short = WAITING + Path(file).name if f"/{WAITING}" in file else Path(file).name
    return f"{frame['function']} ({short}:{frame['line']})"


def _tasks(log: str) -> list[Task]:
    return [Task(**match.groupdict()) for match in _TASK.finditer(log)]


def _killed_tasks(log: str) -> list[Task]:
    """Tasks ended by a signal; not by SIGTERM, with which srun ends the rest."""
    return [task for task in _tasks(log) if task.code is None and not task.is_stop]


def _first_task(log: str) -> Task | None:
    """What srun said of the first task that ended badly; later ones were ended by srun, or by losing the first.

    Of those before srun ended the rest, one that a signal killed comes first: its peers fail within milliseconds, and
    may be reported earlier.
    """
    cut = _COLLATERAL.search(log)
    before = _tasks(log[: cut.start()] if cut else log)
    found = before or _tasks(log)
    killed = [task for task in found if task.code is None and not task.is_stop]
    stopped = [task for task in before if task.is_stop]
    exited = [task for task in found if task.code is not None]
    return next(iter(killed or stopped or exited or found), None)
