"""What checksums cost a build, and how fast ``data check`` reads, beside sha256sum and cat of the same shards.

    python benchmarks/data/bench_check.py

Two data sets are made in a temporary folder: 300 samples with a photograph of 1600 x 1200 (a JPEG of about 400 kB), and
5000 texts, which are a member of 1 kB each. They are read from the page cache, by one process.
"""

import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench_images import jpeg, photograph
from bench_reading import record

from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.reports.damage import check_damage


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def command(*words: str) -> Callable[[], object]:
    """Runs a command without its output."""
    return lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def read(name: str, built: Path, build_seconds: float) -> None:
    """Prints MB/s of each reader, bytes that are kept of a sample, and how much of the build summing is."""
    shards = [str(path) for path in sorted(built.glob("*.tar"))]
    data = b"".join(Path(shard).read_bytes() for shard in shards)
    summing = seconds(lambda: zlib.crc32(data)) / build_seconds
    size = sum(Path(shard).stat().st_size for shard in shards) / 1e6
    report = check_damage(built)
    assert not report.findings
    kept = (built / ".eagle-meta/checksums-1/members.bin").stat().st_size / report.samples
    rates = {
        "check": size / seconds(lambda: check_damage(built)),
        "sha256sum": size / seconds(command("sha256sum", *shards)),
        "cat": size / seconds(command("cat", *shards)),
    }
    said = "  ".join(f"{reader} {rate:6.0f} MB/s" for reader, rate in rates.items())
    print(f"{name:8s} {size:6.0f} MB in {len(shards):2d} shards: {said}")
    print(f"{kept:.0f} bytes kept of a sample; summing is {summing:.2%} of the build's {build_seconds:.1f} s")


def main() -> None:
    """Both data sets, then the cost of the build."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "a.jpg").write_bytes(jpeg(photograph(1600, 1200)))
        (folder / "images.jsonl").write_text("".join(record(n, "<image>What?", image="a.jpg") for n in range(300)))
        (folder / "text.jsonl").write_text("".join(record(n, "What is it?") for n in range(5000)))
        for name in ("images", "text"):
            source, built = folder / f"{name}.jsonl", folder / name
            read(name, built, seconds(partial(build_dataset, source, built)))


if __name__ == "__main__":
    main()
