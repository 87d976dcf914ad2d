"""What many sources cost, and what adding to them does: opening, planning a window, files held open, measuring.

    python benchmarks/data_catalogues.py FOLDER --sources 1 10 100 1000

Opening and planning run over made-up catalogues of 100 000 samples (``data_order.py`` makes them: one, and hard links
to it), so everything is in the page cache. Reading and measuring run over real shards: one data set of 20 samples is
copied by links for each source. CPU seconds, of one process.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import data_order

from megatron_eagle.config.data import BlendSource, DataSettings
from megatron_eagle.config.reading import ReadingSettings
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.build.measure import measure_shards
from megatron_eagle.data.order.measuring import TextOf
from megatron_eagle.data.order.plan import Plan
from megatron_eagle.data.storage.shards import shard_counts
from megatron_eagle.data.stream.sample_files import SampleFiles

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from samples import make_records, make_tokenizer, write_jsonl

SAMPLES, WINDOW, IN_A_SHARD, SHARDS = 100_000, 100_000, 5, 4


def plan(folder: Path, count: int) -> tuple[float, float]:
    """CPU seconds to open ``count`` sources, and to plan a window of WINDOW samples of all of them."""
    data_order.SAMPLES = SAMPLES
    paths = data_order.make_catalogues(folder / "made-up", count)
    settings = DataSettings(
        sources=tuple(BlendSource(str(path), repeat=1.0) for path in paths),
        pack_length=data_order.PACK_LENGTH,
        tokens_per_tile=data_order.TOKENS_PER_TILE,
        reading=ReadingSettings(plan_window=WINDOW),
    )
    begun = time.process_time()
    opened = Plan(settings, data_order.MadeUpTokenizer(), 0)
    ready = time.process_time()
    opened.window(0)
    return ready - begun, time.process_time() - ready


def real_sources(folder: Path, count: int) -> list[Path]:
    """Small data sets, measured and alike."""
    first = folder / "real-0"
    if not first.exists():
        (folder / "files").mkdir(parents=True)
        records = write_jsonl(folder / "files", make_records(folder / "files", IN_A_SHARD * SHARDS))
        build_dataset(records, first, samples_per_shard=IN_A_SHARD)
    for number in range(1, count):
        if not (folder / f"real-{number}").exists():
            shutil.copytree(first, folder / f"real-{number}", copy_function=os.link)
    return [folder / f"real-{number}" for number in range(count)]


def read(folder: Path, count: int) -> tuple[int, float]:
    """Files held open after a sample of each of ``count`` sources was read twice, and CPU milliseconds a sample."""
    sources = real_sources(folder / "real", count)
    key = next(iter(_keys(sources[0])))
    files, before, begun = SampleFiles(), len(os.listdir("/proc/self/fd")), time.process_time()
    for _ in range(2):
        for source in sources:
            files.read(source, key)
    return len(os.listdir("/proc/self/fd")) - before, 500 * (time.process_time() - begun) / count


def _keys(source: Path) -> list[str]:
    from megatron_eagle.data.order.measuring import open_sample_index

    return list(open_sample_index(source).keys)


def measure(folder: Path, count: int) -> tuple[int, int, int]:
    """Shards that are read for ``count`` sources, for the same again, and when one source more is there."""
    paths = [str(path) for path in real_sources(folder / f"measured-{count}", count + 1)]
    text = TextOf(make_tokenizer(folder), "")
    first = measure_shards(paths[:-1], text).now
    again = measure_shards(paths[:-1], text).now
    more = measure_shards(paths, text).now
    assert first == sum(len(shard_counts(path)) for path in paths[:-1])
    return first, again, more


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sources", type=int, nargs="+", default=[1, 10, 100, 1000])
    options = parser.parse_args()
    print(
        "| sources | opened, CPU s | window, CPU s | files held | CPU ms a sample | shards read: all / again / more |"
    )
    print("|---|---|---|---|---|---|")
    for count in options.sources:
        opened, planned = plan(options.folder, count)
        held, milliseconds = read(options.folder, count)
        shards = measure(options.folder, count)
        print(
            f"| {count} | {opened:.2f} | {planned:.1f} | {held} | {milliseconds:.2f} | {' / '.join(map(str, shards))} |"
        )


if __name__ == "__main__":
    main()
