"""What a start costs by parts, what it reads, and what of it grows with the number of processes.

    python benchmarks/start_up.py FOLDER [--processes 1 2 4 8]

Trains the embedded model (all of it, data-parallel) for two steps in FOLDER, then starts it once more from the
checkpoint, in so many processes on this machine. Seconds are those of the slowest process in each part, as the run's
events have them; on fewer cores than processes they wait for each other, so processor seconds of one process stand
beside them. Files opened (without shared libraries, which the linker opens) and bytes read are counted in every process
by an audit hook and by ``/proc/self/io``. The checkpoint is dropped from the page cache before it is loaded: what comes
from the disk is what a node's processes together fetch from it, what they ask for is what the node's memory serves.

Groups: those that Megatron-Core and this package make at a layout are counted in a process that believes itself one of
so many; ``own`` are those that it is a member of, and so the only ones it ever connects.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STAGE, STEPS, SAMPLES = "stage1", 2, 300
NAME = "start-up"
PARTS = ("imports", "meeting", "groups", "checkpoints", "model", "weights", "data", "first step", "all")
RANKS = (8, 64, 256, 1024, 8192)
LAYOUT = {"tp": 2, "pp": 4, "sequence_parallel": True}


def prepare(folder: Path) -> None:
    """The embedded data set and a tokenizer."""
    from megatron_eagle.config.presets import PRESETS
    from megatron_eagle.data.build.dataset import build_dataset
    from megatron_eagle.data.sample.tokenizer import train_sentencepiece
    from megatron_eagle.demo.dataset import generate

    if not (folder / "tokenizer.model").exists():
        records = generate(folder / "raw", split="train", samples=SAMPLES, seed=7)
        build_dataset(records, folder / "data")
        lines = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
        texts = [turn["value"].replace("<image>", "") for line in lines for turn in line["conversations"]]
        train_sentencepiece(
            ["user\n", "assistant\n", *texts], folder / "tokenizer.model", PRESETS["tiny"].language.vocab_size
        )


def arguments(folder: Path, processes: int, steps: int) -> list[str]:
    """Of ``megatron-eagle train``: a pack a process and step, every step saved."""
    return [
        "train", "tiny", "--stage", STAGE, "--runs", str(folder / f"runs-{processes}"), "layout={}",
        f"tokenizer.path={folder / 'tokenizer.model'}", f"stages.{STAGE}.blend=[{{path: {folder / 'data'}}}]",
        f"stages.{STAGE}.batch={processes}", f"stages.{STAGE}.steps={steps}",
        f"stages.{STAGE}.checkpoint_every={STEPS}", f"stages.{STAGE}.trainable=[vision, connector, language]",
        "log.tensorboard=false", f"name={NAME}",
    ]  # fmt: skip


def start(folder: Path, processes: int, steps: int) -> list[dict[str, Any]]:
    """One start; what each process opened and read."""
    from megatron_eagle.parallel.launch import process_variables, reserved_port

    command = [sys.executable, __file__, "--child", str(folder), *arguments(folder, processes, steps)]
    with reserved_port() as port:
        running = [
            subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1", **process_variables(rank, processes, port)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(processes)
        ]
        if any([process.wait() for process in running]):
            raise SystemExit("a process failed")
    return [json.loads((folder / f"counts-{rank}.json").read_text()) for rank in range(processes)]


def child(folder: Path, train: Sequence[str]) -> None:
    """``megatron-eagle train`` in this process, counted."""
    opened: Counter[str] = Counter()

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(values[0], (str, bytes, os.PathLike)):
            opened[_kind(os.fsdecode(values[0]))] += 1

    sys.addaudithook(hook)
    try:
        from megatron_eagle.cli import main

        main(train)
    finally:
        used = resource.getrusage(resource.RUSAGE_SELF)
        io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        counts = {
            "opened": dict(opened),
            "asked for": int(io["rchar"]),
            "from disk": int(io["read_bytes"]),
            "cpu": used.ru_utime + used.ru_stime,
        }
        (folder / f"counts-{os.environ['RANK']}.json").write_text(json.dumps(counts))


def _kind(path: str) -> str:
    if path.endswith((".py", ".pyc")) or "/site-packages/" in path:
        return "code"
    return "checkpoint" if "/checkpoints/" in path else "data" if "/data/" in path else "other"


def forget_pages(folder: Path) -> int:
    """Drop the files below ``folder`` from the page cache; their bytes."""
    size = 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size += file.stat().st_size
    return size


def starts(folder: Path, counts: Sequence[int]) -> None:
    """Both tables of starts."""
    print("| processes | start | " + " | ".join(PARTS) + " | CPU s of one |")
    print("|---" * (len(PARTS) + 3) + "|")
    reading = []
    for processes in counts:
        run = folder / f"runs-{processes}"
        subprocess.run(["rm", "-rf", str(run)], check=True)
        for name, steps in (("new", STEPS), ("continued", 2 * STEPS)):
            saved = forget_pages(run / NAME / "checkpoints") if name == "continued" else 0
            every = start(folder, processes, steps)
            lines = (run / NAME / "events.jsonl").read_text().splitlines()
            seconds = [event for event in map(json.loads, lines) if event["event"] == "start_up"][-1]["seconds"]
            cpu = sum(one["cpu"] for one in every) / processes
            print(
                f"| {processes} | {name} | " + " | ".join(f"{seconds[part]:.2f}" for part in PARTS) + f" | {cpu:.1f} |"
            )
            opened = sum((Counter(one["opened"]) for one in every), Counter())
            kinds = " | ".join(f"{opened[kind] / processes:.0f}" for kind in ("code", "data", "checkpoint", "other"))
            bytes_read = " | ".join(
                f"{sum(one[kind] for one in every) / 1e6:.0f}" for kind in ("asked for", "from disk")
            )
            reading.append(f"| {processes} | {name} | {kinds} | {saved / 1e6:.0f} | {bytes_read} |")
    print("\n| processes | start | code files, each | data, each | checkpoint, each | other, each |", end="")
    print(" checkpoint MB | MB asked for, all | MB from disk, all |\n|" + "---|" * 9)
    print("\n".join(reading))


def groups() -> None:
    """The table of groups, each number of ranks in a process of its own."""
    print(f"\n| ranks | groups made, {LAYOUT} | own | seconds of making them |\n|---|---|---|---|", flush=True)
    for ranks in RANKS:
        subprocess.run([sys.executable, __file__, "--groups", str(ranks)], check=True)


def count_groups(ranks: int) -> None:
    """A row of ``groups``: as rank 0."""
    import time
    from datetime import timedelta

    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_eagle.compat.fake_processes import join_alone
    from megatron_eagle.config.layout import Layout
    from megatron_eagle.parallel.groups import RankCoordinates, split

    layout, made = Layout(**LAYOUT), Counter[bool]()
    join_alone(0, ranks)
    new_group: Any = dist.new_group

    def counted(ranks: Any = None, **named: Any) -> Any:
        made[ranks is None or 0 in ranks] += 1
        return new_group(ranks, **named)

    dist.new_group = counted
    started = time.perf_counter()
    parallel_state.initialize_model_parallel(layout.tp, layout.pp, create_gloo_process_groups=False)
    replicas = ranks // (layout.tp * layout.pp)
    places = [
        RankCoordinates(dp=rank // layout.tp % replicas, pp=rank // (layout.tp * replicas), cp=0, tp=rank % layout.tp)
        for rank in range(ranks)
    ]
    split(layout, places, timedelta(minutes=1))
    print(f"| {ranks} | {made.total()} | {made[True]} | {time.perf_counter() - started:.2f} |", flush=True)


def main() -> None:
    """Prints the tables."""
    if sys.argv[1:2] == ["--child"]:
        return child(Path(sys.argv[2]), sys.argv[3:])
    if sys.argv[1:2] == ["--groups"]:
        return count_groups(int(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    prepare(options.folder.resolve())
    starts(options.folder.resolve(), options.processes)
    groups()
    return None


if __name__ == "__main__":
    main()
