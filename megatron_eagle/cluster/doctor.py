"""The pre-flight: can these processes, on these nodes, train together? Names the node that cannot.

Facts travel through a plain key-value store before any collective is tried, because a collective with a broken node
only hangs: who is missing, whose packages, clock or file system differ, whose disk is full, is said by name. Then one
all-reduce is timed.
"""

import contextlib
import importlib.metadata
import json
import platform as host
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_eagle.compat.platform import Platform
from megatron_eagle.training.watchdog import node_name

PACKAGES = (
    "megatron-eagle",
    "megatron-core",
    "megatron-energon",
    "torch",
    "transformers",
    "triton",
    "numpy",
    "pydantic",
)
GPU_PACKAGES = ("transformer-engine",)
CLOCK_SECONDS = 5.0
LAST_WORDS_SECONDS = 5.0
ALL_REDUCE_BYTES = {"nccl": 1 << 30, "gloo": 1 << 20}
ALL_REDUCE_ROUNDS = 5
MARK = ".doctor-{rank}"


@dataclass(frozen=True)
class Facts:
    """What one process says of itself and its node.

    seen: ranks whose mark it found in the shared folder; error: what went wrong before it could look.
    clock: its time, as Unix seconds, when all had been told to look at it.
    """

    rank: int
    node: str
    versions: dict[str, str]
    device: str
    gpus: int
    free_gb: float = 0.0
    error: str = ""
    seen: list[int] = field(default_factory=list)
    clock: float = 0.0


@dataclass(frozen=True)
class Diagnosis:
    """bad: node -> what is wrong with it; lines: the report."""

    bad: dict[str, str]
    lines: list[str]


@dataclass(frozen=True)
class Wants:
    """folder: shared by all nodes; min_free_gb: to be free there; timeout: seconds to wait for a process.

    nodes: names of all nodes in the order of their ranks, each with as many; empty if the launcher did not say.
    """

    folder: Path
    min_free_gb: float
    timeout: float
    nodes: tuple[str, ...] = ()

    def node_of(self, rank: int, world: int) -> str:
        """Where a process was to run that cannot say so itself; "?" if nobody knows."""
        return self.nodes[rank * len(self.nodes) // world] if self.nodes else "?"


def examine(platform: Platform, wants: Wants, store: dist.TCPStore, rank: int, world: int) -> Diagnosis | None:
    """Every process calls this; rank 0 gets the diagnosis. No collective is used until everybody is well."""
    facts = _own_facts(platform, wants, rank)
    store.set(f"mark/{rank}", facts.node)
    if rank == 0:
        missing = _wait(store, [f"mark/{other}" for other in range(world)], wants.timeout)
        store.set("look", json.dumps([other for other in range(world) if f"mark/{other}" not in missing]))
    store.wait(["look"], timedelta(seconds=2 * wants.timeout))
    present = json.loads(store.get("look"))
    clock = time.time()
    seen = [] if facts.error else _marks_seen(wants.folder, present)
    store.set(f"facts/{rank}", json.dumps(asdict(facts) | {"seen": seen, "clock": clock}))
    if rank == 0:
        _wait(store, [f"facts/{other}" for other in present], wants.timeout)
        known = [Facts(**json.loads(store.get(f"facts/{r}"))) for r in present if store.check([f"facts/{r}"])]
        diagnosis = diagnose(known, world, wants)
        store.set("well", json.dumps(not diagnosis.bad))
    store.wait(["well"], timedelta(seconds=3 * wants.timeout))
    with contextlib.suppress(OSError):  # where it could not be written, either
        (wants.folder / MARK.format(rank=rank)).unlink()
    if json.loads(store.get("well")):
        line = _all_reduce(platform, wants.timeout)
        if rank == 0:
            diagnosis.lines.append(line)
    store.set(f"done/{rank}", "")
    if rank == 0:  # the store goes with this process
        _wait(store, [f"done/{other}" for other in present], LAST_WORDS_SECONDS)
    return diagnosis if rank == 0 else None


def diagnose(known: Sequence[Facts], world: int, wants: Wants) -> Diagnosis:
    """Compare what the processes said; what most of them agree on is taken to be right.

    Two against two, process 0 is: its node runs the batch script, and has written the log into the folder.
    """
    bad: dict[str, list[str]] = {}
    nodes = list(dict.fromkeys(facts.node for facts in known))
    for facts in known:
        if facts.error:
            bad.setdefault(facts.node, []).append(facts.error)
        elif facts.free_gb < wants.min_free_gb:
            said = f"{facts.free_gb:.1f} GB free in {wants.folder}, {wants.min_free_gb:g} are wanted"
            bad.setdefault(facts.node, []).append(said)
    for name in sorted({name for facts in known for name in facts.versions}):
        _name_the_odd(bad, known, name, [facts.versions.get(name, "missing") for facts in known])
    _name_the_odd(bad, known, "devices on the node", [f"{facts.gpus} x {facts.device}" for facts in known])
    clocks = sorted(facts.clock for facts in known)
    median = clocks[len(clocks) // 2]
    for facts in known:
        if abs(facts.clock - median) > CLOCK_SECONDS:
            bad.setdefault(facts.node, []).append(f"its clock is off by {facts.clock - median:+.0f} s")
    _name_the_blind(bad, [facts for facts in known if not facts.error])
    gone = sorted(set(range(world)) - {facts.rank for facts in known})
    for node in dict.fromkeys(wants.node_of(rank, world) for rank in gone):
        ranks = ", ".join(str(rank) for rank in gone if wants.node_of(rank, world) == node)
        bad.setdefault(node, []).append(f"ranks {ranks} of {world} did not answer within {wants.timeout:g} s")
    lines = [f"{node}: ok" for node in nodes if node not in bad]
    return Diagnosis({node: "; ".join(dict.fromkeys(said)) for node, said in bad.items()}, lines)


def _name_the_odd(bad: dict[str, list[str]], known: Sequence[Facts], what: str, values: Sequence[str]) -> None:
    usual = Counter(values).most_common(1)[0][0]
    for facts, value in zip(known, values, strict=True):
        if value != usual:
            bad.setdefault(facts.node, []).append(f"{what} is {value}, elsewhere {usual}")


def _name_the_blind(bad: dict[str, list[str]], writers: Sequence[Facts]) -> None:
    """Who does not see the marks of most others has another file system behind the folder's name."""
    for facts in writers:
        blind = [other.rank for other in writers if other.rank not in facts.seen]
        if 2 * len(blind) > len(writers) or (2 * len(blind) == len(writers) and writers[0].rank in blind):
            said = f"does not see what ranks {', '.join(map(str, blind))} wrote: the folder is not shared with them"
            bad.setdefault(facts.node, []).append(said)


def _own_facts(platform: Platform, wants: Wants, rank: int) -> Facts:
    cuda = platform.device.type == "cuda"
    facts = Facts(
        rank=rank,
        node=node_name(),
        versions={"python": host.python_version()}
        | {name: _version(name) for name in PACKAGES + (GPU_PACKAGES if cuda else ())}
        | ({"NCCL": str(torch.cuda.nccl.version()), "driver": _driver()} if cuda else {}),
        device=torch.cuda.get_device_name(platform.device) if cuda else host.machine(),
        gpus=torch.cuda.device_count() if cuda else 0,
    )
    try:
        wants.folder.mkdir(parents=True, exist_ok=True)
        (wants.folder / MARK.format(rank=rank)).write_text(facts.node, encoding="utf-8")
        free = shutil.disk_usage(wants.folder).free / 1e9
    except OSError as error:
        return Facts(**asdict(facts) | {"error": f"cannot write to {wants.folder}: {error.strerror}"})
    return Facts(**asdict(facts) | {"free_gb": free})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _marks_seen(folder: Path, ranks: Sequence[int]) -> list[int]:
    """Network file systems may show a new file late; a few seconds are granted."""
    for _ in range(10):
        seen = [rank for rank in ranks if (folder / MARK.format(rank=rank)).exists()]
        if len(seen) == len(ranks):
            break
        time.sleep(0.5)
    return seen


def _wait(store: dist.TCPStore, keys: Sequence[str], timeout: float) -> set[str]:
    """Those of ``keys`` that were not set in time."""
    deadline = time.monotonic() + timeout
    missing = set(keys)
    while missing and time.monotonic() < deadline:
        missing = {key for key in missing if not store.check([key])}
        if missing:
            time.sleep(0.1)
    return missing


def _all_reduce(platform: Platform, timeout: float) -> str:
    device = platform.device if platform.backend == "nccl" else None
    dist.init_process_group(platform.backend, timeout=timedelta(seconds=timeout), device_id=device)
    try:
        size = ALL_REDUCE_BYTES[platform.backend]
        data = torch.ones(size // 4, device=platform.device)
        dist.all_reduce(data)
        dist.barrier()
        started = time.perf_counter()
        for _ in range(ALL_REDUCE_ROUNDS):
            data.fill_(1.0)
            dist.all_reduce(data)
        total = float(data[0])  # waits for the device
        seconds = (time.perf_counter() - started) / ALL_REDUCE_ROUNDS
        world = dist.get_world_size()
        if total != world:
            raise RuntimeError(f"an all-reduce of ones over {world} processes gave {total}")
        rate = 2 * (world - 1) / world * size / seconds / 1e9  # bus bandwidth, as NVIDIA's nccl-tests count it
        return f"all-reduce of {size >> 20} MiB over {world} processes: {seconds * 1e3:.1f} ms, {rate:.2f} GB/s"
    finally:
        dist.destroy_process_group()
