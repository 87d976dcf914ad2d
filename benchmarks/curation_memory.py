"""Memory of a curation against the number of its samples, and against the size of their pictures.

    python benchmarks/curation_memory.py FOLDER [--samples 2000 20000 200000] [--rules turn_order empty lint]

Each run is a process of its own that does everything (one worker); its largest resident memory is the kernel's.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import yaml
from PIL import Image

PICTURES = 20
RUN = """
import resource, sys
from pathlib import Path
from megatron_eagle.curation.engine import curate
from megatron_eagle.curation.plan import load_plan
if __name__ == "__main__":
    plan = load_plan(Path(sys.argv[1]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    curate(plan, Path(sys.argv[2]))
    own = resource.getrusage(resource.RUSAGE_SELF)
    print(before * 1024, own.ru_maxrss * 1024, own.ru_utime + own.ru_stime)
"""


def write(folder: Path, samples: int, side: int, seed: int = 1) -> Path:
    """Short records, each with one of a few pictures of ``side`` pixels."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for number in range(PICTURES):
        Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(folder / f"{number}.jpg", quality=60)
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        for number in range(samples):
            turns = [("human", "<image>\nWhat number is this?"), ("gpt", str(rng.randrange(1000)))]
            talk = [{"from": role, "value": text} for role, text in turns]
            record = {"id": f"short-{number:07d}", "image": f"{number % PICTURES}.jpg", "conversations": talk}
            file.write(json.dumps(record) + "\n")
    return folder / "samples.jsonl"


def measure(folder: Path, samples: int, side: int, rules: list[str]) -> str:
    """One row of the table."""
    source = write(folder / "raw", samples, side)
    operators = [{"use": name} for name in rules]
    plan = {"name": "memory", "sources": [{"name": "short", "path": str(source)}], "operators": operators}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    started = time.monotonic()
    command = [sys.executable, "-c", RUN, str(folder / "plan.yaml"), str(folder / "out")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    before, most, used = (float(one) for one in said)
    return (
        f"| {samples} | {side} x {side} | {', '.join(rules)} | {before / 1e6:.0f} MB | {most / 1e6:.0f} MB "
        f"| {(most - before) / samples / 1e3:.2f} kB | {used:.0f} s | {time.monotonic() - started:.0f} s |"
    )


def main() -> None:
    """All runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", default=[2000, 20000, 200000])
    parser.add_argument("--rules", nargs="+", default=["turn_order", "empty", "lint"])
    options = parser.parse_args()
    print("| samples | pictures | operators | before | most | more, a sample | CPU | wall |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for side in (64, 512):
        print(measure(options.folder / f"side-{side}", 2000, side, ["image_size", "image_hashes"]), flush=True)
    for samples in options.samples:
        print(measure(options.folder / str(samples), samples, 64, options.rules), flush=True)


if __name__ == "__main__":
    main()
