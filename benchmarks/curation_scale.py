"""A million hashes, a million vectors in clusters, and texts by vector: this project's searches beside other tools'.

    python benchmarks/curation_scale.py [--hashes N] [--vectors N] [--clusters K] [--texts N] [--beside FOLDER]

FOLDER holds imagededup, semhash and what they ask for (pip install --target FOLDER imagededup semhash). Each part runs
in a process of its own, so that its memory is its own. imagededup compares every hash with every other: it is given 200
queries, and what all would take is reckoned. Seconds are of the clock and of the processor.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from megatron_eagle.curation.hashing import near_pairs
from megatron_eagle.curation.selection import cluster
from megatron_eagle.curation.similarity import near_vectors
from megatron_eagle.curation.vectors import unit

DISTANCE = 8
QUERIES = 200
ALIKE = 0.9  # cosine


@contextmanager
def clocked(what: str) -> Iterator[None]:
    """Prints seconds, processor seconds and the process's largest memory so far."""
    wall, own = time.perf_counter(), time.process_time()
    yield
    wall, own = time.perf_counter() - wall, time.process_time() - own
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| {what} | {wall:.1f} | {own:.1f} | {memory:.2f} GB |", flush=True)


def planted_hashes(many: int) -> tuple[Any, Any, Any]:
    """(hashes, originals, copies): nine of ten random, the rest copies with up to eight bits changed."""
    rng = np.random.default_rng(1)
    whole = rng.integers(0, 2**64, many * 9 // 10, dtype=np.uint64)
    originals = rng.integers(0, len(whole), many - len(whole))
    copies = whole[originals]
    for _ in range(DISTANCE):
        bits = np.uint64(1) << rng.integers(0, 64, len(copies)).astype(np.uint64)
        copies = copies ^ np.where(rng.random(len(copies)) < 0.6, bits, np.uint64(0))
    return np.concatenate([whole, copies]), originals, len(whole) + np.arange(len(copies))


def hashes(many: int, beside: str | None) -> None:
    """Ours, its recall of planted pairs, and imagededup's."""
    own, originals, copies = planted_hashes(many)
    with clocked(f"{many} hashes, all pairs within {DISTANCE} bits"):
        pairs = [np.minimum(one, two) * many + np.maximum(one, two) for one, two in near_pairs(own, DISTANCE)]
        found = np.unique(np.concatenate(pairs))
    wanted = np.unique(originals * many + copies)
    print(f"| recall of {len(wanted)} planted pairs: {np.isin(wanted, found).mean():.6f} | | | |", flush=True)
    if beside is not None:
        sys.path.append(beside)
        import brute_force_cython_ext as search  # imagededup's

        names, values = [str(number).encode() for number in range(many)], [int(one) for one in own]
        began = time.process_time()
        for number in copies[:QUERIES].tolist():
            search.query(names, values, values[number], DISTANCE)
        each = (time.process_time() - began) / QUERIES
        print(f"| imagededup, {QUERIES} queries; all of them would take | | {each * many:.0f} | |", flush=True)


def planted_vectors(many: int, dim: int, centres: int) -> Any:
    """Unit vectors around centres."""
    rng = np.random.default_rng(2)
    middle = rng.standard_normal((centres, dim), np.float32)
    out = np.empty((many, dim), np.float32)
    for low in range(0, many, 50_000):
        part = middle[rng.integers(0, centres, min(50_000, many - low))]
        out[low : low + 50_000] = unit(part + 0.7 * rng.standard_normal(part.shape, np.float32))
    return out


def clusters(many: int, wanted: int) -> None:
    """faiss, as 'subset' uses it: training and assignment."""
    vectors = planted_vectors(many, 512, wanted)
    with clocked(f"{many} vectors of 512 in {wanted} clusters"):
        found = cluster(vectors, wanted, 0)
    print(f"| {len(np.unique(found.of))} clusters have members, separation {found.separation:.3f} | | | |", flush=True)


def texts(many: int, beside: str | None) -> None:
    """Near-duplicates among ready vectors of 384: all pairs here, semhash's approximate search there."""
    own = planted_vectors(many, 384, many * 9 // 10)
    rng = np.random.default_rng(3)
    originals = rng.integers(0, many * 9 // 10, many - many * 9 // 10)
    copies = np.arange(many * 9 // 10, many)
    own[copies] = unit(own[originals] + 0.018 * rng.standard_normal((len(copies), 384), np.float32))
    with clocked(f"{many} vectors of 384, all pairs from {ALIKE} on"):
        pairs = [one * many + two for one, two in near_vectors(own, ALIKE, "cpu")]
    found = np.concatenate(pairs) if pairs else np.empty(0, np.int64)
    print(f"| copies found: {np.isin(copies, found % many).mean():.6f} | | | |", flush=True)
    if beside is not None:
        sys.path.append(beside)
        from semhash import SemHash

        records = [f"text {number}" for number in range(many)]
        with clocked(f"{many} vectors of 384 by semhash, given them ready"):
            ready = SemHash.from_embeddings(own, records, model=None)
            result = ready.self_deduplicate(threshold=ALIKE)
        gone = {one.record for one in result.filtered}
        lost = np.mean(
            [f"text {one}" in gone or f"text {other}" in gone for one, other in zip(copies, originals, strict=True)]
        )
        print(f"| copies found by semhash: {lost:.6f} | | | |", flush=True)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser()
    for name, default in (("hashes", 1_000_000), ("vectors", 1_000_000), ("clusters", 2_000), ("texts", 100_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--beside")
    options = parser.parse_args()
    print("| | seconds | processor seconds | largest memory |\n|---|---|---|---|", flush=True)
    work: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (hashes, (options.hashes, options.beside)),
        (clusters, (options.vectors, options.clusters)),
        (texts, (options.texts, options.beside)),
    ]
    for part, given in work:
        if given[0]:
            process = multiprocessing.get_context("spawn").Process(target=part, args=given)
            process.start()
            process.join()


if __name__ == "__main__":
    main()
