"""Eq. 1 of Eagle 2, exact, against what the same machine's matrix products reach in the same run.

    python benchmarks/similarity.py FOLDER [NEW POOL]     # 10 000 x 1 000 000 by default, 512 and 384 dimensions

FOLDER takes the pool's vectors, 3.6 GB for a million, and is what they are streamed from. The rate of plain matrix
products of the same shapes, whose results are thrown away, is measured between parts of the pool, so that other work on
the machine meets both alike. Seconds are also given as processor time, which other work changes less.
"""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_eagle.curation.similarity import POOL_BLOCK, Pairs, best_matches
from megatron_eagle.curation.vectors import unit

DIMS = {"images": 512, "texts": 384}
CHUNK = 50_000  # rows of the pool between two measurements


def write(path: Path, rows: int, dim: int, seed: int) -> None:
    """Random unit vectors around a few hundred centres, as .npy; left alone if they are there."""
    if path.exists():
        return
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(dim).normal(size=(300, dim)).astype(np.float32)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, dim))
    for low in range(0, rows, CHUNK):
        own = centres[rng.integers(0, 300, min(CHUNK, rows - low))]
        out[low : low + CHUNK] = unit(own + rng.standard_normal(own.shape, np.float32))
    out.flush()


def clocked(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds and processor seconds."""
    wall, own = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - own


def plain(new: Pairs, pool: Pairs) -> float:
    """Products of all rows of ``new`` with a block of the pool, into one buffer; returns operations."""
    work = 0.0
    for one, other in ((new.images, pool.images), (new.texts, pool.texts)):
        first, second = torch.from_numpy(np.asarray(one[:])), torch.from_numpy(np.array(other[:POOL_BLOCK]))
        out = torch.empty(len(first), len(second))
        torch.mm(first, second.T, out=out)
        work += 2.0 * len(first) * len(second) * first.shape[1]
    return work


def main(folder: Path, new_rows: int, pool_rows: int) -> None:
    """Prints a table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, dim in DIMS.items():
        write(folder / f"new-{new_rows}-{name}.npy", new_rows, dim, 1)
        write(folder / f"pool-{pool_rows}-{name}.npy", pool_rows, dim, 2)
    new = Pairs(*(np.load(folder / f"new-{new_rows}-{name}.npy") for name in DIMS))
    whole = {name: np.load(folder / f"pool-{pool_rows}-{name}.npy", mmap_mode="r") for name in DIMS}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent, peak, best = np.zeros(2), np.zeros(2), np.full(new_rows, -np.inf)
    operations = 0.0
    plain(new, Pairs(*whole.values()))  # threads and buffers are made
    for low in range(0, pool_rows, CHUNK):
        part = Pairs(*(one[low : low + CHUNK] for one in whole.values()))

        def compare(part: Pairs = part) -> None:
            np.maximum(best, best_matches(new, part, device="cpu").scores[:, 0], out=best)

        spent += clocked(compare)

        def products(part: Pairs = part) -> None:
            nonlocal operations
            operations += plain(new, part)

        peak += clocked(products)
    work = 2.0 * new_rows * pool_rows * sum(DIMS.values())
    rates = work / spent / 1e9, operations / peak / 1e9
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"S = {best.mean():.6f}; {new_rows} x {pool_rows}, {torch.get_num_threads()} threads, {work / 1e12:.2f} TFLOP"
    )
    print(f"| | seconds | processor seconds |\n|---|---|---|\n| Eq. 1 | {spent[0]:.1f} | {spent[1]:.1f} |")
    print(f"| GFLOP/s of Eq. 1 | {rates[0][0]:.1f} | {rates[0][1]:.1f} |")
    print(f"| GFLOP/s of plain products, between its parts | {rates[1][0]:.1f} | {rates[1][1]:.1f} |")
    print(f"| share | {rates[0][0] / rates[1][0]:.2f} | {rates[0][1] / rates[1][1]:.2f} |")
    print(f"largest memory {after / 2**20:.2f} GB, {before / 2**20:.2f} GB of it before the first product")
    large = 2.0 * 1e5 * 1e7 * sum(DIMS.values())
    print(f"100 000 x 10 000 000: {large / 1e15:.1f} PFLOP, {large / rates[0][0] / 3.6e12:.1f} hours at this rate")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(one) for one in (sys.argv[2:] or ("10000", "1000000"))))
