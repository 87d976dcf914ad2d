"""What the order of packs costs a node of 8 ranks as data grows: start, continue at 90 % of an epoch, memory.

    python benchmarks/data_order.py FOLDER --sources 1 10 100 1000

Catalogues are made up: one data set of a million samples gets a real ``.eagle-meta`` in FOLDER (90 MB) and no shards,
the others are hard links to its arrays with identities of their own. So a thousand of them are all in the page cache,
which flatters: on a disk every window reads pages that were not read before. 8 processes open a stream each, as 8 ranks
do, and go on until each has the order of its first pack, then through the orders of a window's packs; nothing is read
from shards. Seconds are by the clock, until the last of them is ready; imports are not counted. CPU seconds are of the
busiest rank and of all of them until then: two cores that do nothing else need the larger of the first and half of the
second. Memory is the sum of PSS of the 8 (a page that k processes map counts 1 / k in each), the most of samples every
50 ms, less what the process had that they were forked from.

It runs on older versions too (PYTHONPATH), whose positions name no window.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_eagle.config.data import BlendSource, DataSettings
from megatron_eagle.config.reading import ReadingSettings
from megatron_eagle.data.order.measuring import text_tokens
from megatron_eagle.data.order.sample_index import Names, SampleIndex, save_index
from megatron_eagle.data.stream.planned import PlannedStream

SAMPLES, BATCH = 1_000_000, 64
PACK_LENGTH, TOKENS_PER_TILE = 16_384, 256


@dataclass
class MadeUpTokenizer:
    """A name, and nothing that reads text."""

    fingerprint: str = "made up"
    pad: int = 0

    def encode(self, text: str) -> list[int]:
        """One token a character."""
        return [ord(letter) for letter in text]


def make_catalogues(folder: Path, count: int) -> list[Path]:
    """Data sets of a million samples each, without shards: text of median 700 tokens, none to two images."""
    first = folder / "source-0"
    if not first.exists():
        draw = np.random.default_rng(0)
        images = draw.integers(0, 3, SAMPLES)
        known = draw.integers(200, 2000, (50_000, 2)).astype(np.int32)
        _prepare(first, "source-0")
        save_index(
            SampleIndex(
                path=first,
                identity="source-0",
                keys=Names.of(f"{number:09d}-sample-{number}" for number in range(SAMPLES)),
                ids=Names.of(f"sample-{number}" for number in range(SAMPLES)),
                image_sizes=known[draw.integers(0, len(known), images.sum())],
                first_image=np.cumsum([0, *images]),
                videos=np.zeros((0, 4)),
                first_video=np.zeros(SAMPLES + 1, np.int64),
                broken={},
            )
        )
        np.save(
            first / ".eagle-meta" / "tokens.npy", np.exp(draw.normal(np.log(700), 1.0, SAMPLES)).astype(np.int32) + 16
        )
        _link_tokens(first, first)
    for number in range(1, count):
        own = folder / f"source-{number}"
        if not own.exists():
            _prepare(own, own.name)
            shutil.copytree(first / ".eagle-meta/samples-3", own / ".eagle-meta/samples-3", copy_function=os.link)
            description = own / ".eagle-meta/samples-3/samples.json"
            said = json.loads(description.read_text())
            description.unlink()
            description.write_text(json.dumps({**said, "identity": own.name}))
            _link_tokens(first, own)
    return [folder / f"source-{number}" for number in range(count)]


def _prepare(folder: Path, identity: str) -> None:
    (folder / ".nv-meta").mkdir(parents=True)
    (folder / ".nv-meta/.info.json").write_text(json.dumps({"shard_counts": {"none.tar": SAMPLES}}))
    (folder / ".nv-meta/index.uuid").write_text(identity)
    (folder / ".eagle-meta").mkdir()


def _link_tokens(first: Path, own: Path) -> None:
    """Under the name that ``text_tokens`` looks for, which it is asked for by letting it count nothing."""
    index = SampleIndex(
        own, own.name, Names.of([]), Names.of([]), *(np.zeros(0, np.int32) for _ in range(4)), broken={}
    )
    info = own / ".nv-meta/.info.json"
    said = info.read_text()
    info.write_text(json.dumps({"shard_counts": {}}))
    text_tokens(index, MadeUpTokenizer(), ReadingSettings().system)
    info.write_text(said)
    (file,) = own.glob(".eagle-meta/text-*.npy")
    file.unlink()
    os.link(first / ".eagle-meta/tokens.npy", file)


def rank_of_a_node(rank, ranks, settings, position, ready, go, done):
    """Opens a stream, has its first order, and then those of the packs of one window."""
    stream = PlannedStream(settings, MadeUpTokenizer(), rank=rank, world_size=ranks, batch=BATCH)
    if position is not None:
        saved = json.loads(stream.state())
        saved["packs"] = position["packs"]
        if "window" in saved:
            saved["window"] = {"window": position["window"], "packs": position["packs"]}
        stream.restore(json.dumps(saved).encode())
    orders = stream._orders()
    pack, cpu = next(orders), time.process_time()
    ready.wait()
    go.wait()
    begun, packs = time.process_time(), 0
    while pack.number < (position["packs"] if position else 0) + 0.9 * position_step(stream):
        pack, packs = next(orders), packs + 1
    done.put((packs, time.process_time() - begun, cpu))
    go.wait()
    stream.close()


def position_step(stream) -> int:
    """Packs of the window that is read."""
    known = stream.plan._first_packs
    return known[-1] - known[-2]


def pss(pids) -> int:
    """Bytes of these processes, each page shared out among all that map it."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def measure(settings: DataSettings, position: dict | None, count: int) -> dict[str, float]:
    """Seconds until the ranks are ready, CPU milliseconds a pack after that, GB at most and when all is ready."""
    context = multiprocessing.get_context("fork")
    ready, go, done = context.Barrier(count + 1), context.Barrier(count + 1), context.Queue()
    before = pss([os.getpid()])
    begun = time.perf_counter()
    ranks = [
        context.Process(target=rank_of_a_node, args=(rank, count, settings, position, ready, go, done))
        for rank in range(count)
    ]
    for own in ranks:
        own.start()
    most = 0
    while ready.n_waiting < count:
        most = max(most, pss([own.pid for own in ranks]))
        if any(own.exitcode for own in ranks):
            raise SystemExit("a rank ended")
        time.sleep(0.05)
    seconds = time.perf_counter() - begun
    ready.wait()
    at_rest = pss([own.pid for own in ranks])
    go.wait()
    rows = []
    while len(rows) < count:
        most = max(most, pss([own.pid for own in ranks]))
        while not done.empty():
            rows.append(done.get())
        time.sleep(0.05)
    go.wait()
    for own in ranks:
        own.join()
    packs, took, cpu = zip(*rows, strict=True)
    return {
        "seconds": seconds,
        "busiest": max(cpu),
        "all": sum(cpu),
        "most_gb": (most - before) / 1e9,
        "rest_gb": (at_rest - before) / 1e9,
        "ms": 1000 * sum(took) / sum(packs),
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sources", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--window", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--ranks", type=int, default=8)
    options = parser.parse_args()
    print("| samples | window | | seconds | CPU s, busiest | CPU s, all | GB at most | GB at rest | CPU ms a pack |")
    print("|---|---|---|---|---|---|---|---|---|")
    for count in options.sources:
        paths = make_catalogues(options.folder, count)
        for window in options.window:
            settings = DataSettings(
                sources=tuple(BlendSource(str(path), repeat=1.0) for path in paths),
                pack_length=PACK_LENGTH,
                tokens_per_tile=TOKENS_PER_TILE,
                reading=ReadingSettings(plan_window=window),
            )
            windows = -(-count * SAMPLES // window)
            at = int(0.9 * windows)
            packs = int(0.9 * count * 110_000) // BATCH * BATCH  # about as many as windows before have
            for name, position in (("start", None), ("at 90 %", {"window": at, "packs": packs})):
                found = measure(settings, position, options.ranks)
                print(
                    f"| {count * SAMPLES:,} | {window:,} | {name} | {found['seconds']:.1f} | {found['busiest']:.1f} | "
                    f"{found['all']:.1f} | {found['most_gb']:.2f} | {found['rest_gb']:.2f} | {found['ms']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
