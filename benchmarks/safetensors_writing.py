"""Writing a safetensors file: by the library, which takes all tensors at once, and streamed, tensor by tensor.

    python benchmarks/safetensors_writing.py eagle2-1b FOLDER     # writes about 2 GB on FOLDER's disk, six times

Prints a Markdown table: seconds until the bytes are on the disk (three runs of each, in turns, each in a process of its
own), seconds of processor time, and the largest anonymous memory (``RssAnon``). Tensors are random bf16 numbers, made
when they are asked for, as those of a conversion are.
"""

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from checkpoint_conversion import RandomModel, anonymous_bytes
from safetensors.torch import save_file

from megatron_eagle.config.presets import PRESETS
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.conversion.safetensors_folder import write_safetensors

RUNS = 3
WAYS = ("library", "streamed")


def write(way, model, folder):
    """All of ``model`` as one file, its bytes on the disk."""
    if way == "streamed":
        write_safetensors(model, folder)
        return
    file = folder / "model.safetensors"
    # A copy, because a view would take its whole storage along.
    save_file({name: model.read(name).clone() for name in model.infos}, file, metadata={"format": "pt"})
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def measure(way, shape, folder):
    """In a process of its own: (seconds, processor seconds, bytes of anonymous memory above those at the start)."""
    config = PRESETS[shape]
    model = RandomModel(config, Dialect.published(config, "A" if len(config.encoders) > 1 else "B"))
    before = peak = anonymous_bytes(os.getpid())
    done = threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_bytes(os.getpid()))

    sampler = threading.Thread(target=sample)
    sampler.start()
    started, cpu = time.perf_counter(), time.process_time()
    write(way, model, folder)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    done.set()
    sampler.join()
    (folder / "model.safetensors").unlink()
    return seconds, cpu, peak - before


def main():
    """Measure each way in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(PRESETS))
    parser.add_argument("folder", type=Path, help="an existing folder on the disk to measure")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(*measure(options.one, options.shape, options.folder))
        return
    found = {way: [] for way in WAYS}
    for _ in range(RUNS):
        for way in WAYS:
            command = [sys.executable, __file__, options.shape, str(options.folder), "--one", way]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[way].append([float(number) for number in answer.split()])
    print(f"| {options.shape}, random bf16, one file | library | streamed |\n|---|---|---|")
    for title, column, scale, unit in (
        ("seconds, median", 0, 1, "s"),
        ("processor seconds, median", 1, 1, "s"),
        ("largest anonymous memory", 2, 1e9, "GB"),
    ):
        pick = max if unit == "GB" else statistics.median
        values = [f"{pick(run[column] for run in found[way]) / scale:.2f} {unit}" for way in WAYS]
        print(f"| {title} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
