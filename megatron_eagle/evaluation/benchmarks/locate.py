"""Where the file of a benchmark is: named, or known by its name in the folder of all of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark
from megatron_eagle.evaluation.benchmarks.entry import Entries, Entry
from megatron_eagle.evaluation.benchmarks.files import PictureFile, read_parquet, read_tsv
from megatron_eagle.evaluation.benchmarks.table import find_benchmark
from megatron_eagle.evaluation.benchmarks.tasks import read_task

KINDS = ("*.tsv", "*.parquet", "*.yaml")
_SPLIT = re.compile(r"[-_.]\d{5}-of-\d{5}.*$|\.parquet$")


@dataclass(frozen=True)
class Request:
    """A benchmark and its files: one TSV, one task, or the Parquet files of one split."""

    benchmark: Benchmark
    files: tuple[Path, ...]

    def read(self, pictures: PictureFile) -> tuple[list[Entry], tuple[str, ...]]:
        """(all entries, parts of a task that are left out); raises UserError if the file is none of the three."""
        first = self.files[0]
        if first.suffix == ".tsv":
            return Entries(self.benchmark).of(read_tsv(first, pictures)), ()
        if first.suffix == ".parquet":
            return Entries(self.benchmark).of(read_parquet(self.files, pictures)), ()
        task = read_task(first)
        return Entries(self.benchmark, task).of(read_parquet(task.files, pictures)), task.left_out


def parse_requests(text: str, data: Path) -> list[Request]:
    """``docvqa,mmmu=MMMU_DEV_VAL.tsv`` as requests, paths within ``data``; raises UserError with what is there."""
    requests = []
    for part in text.split(","):
        name, _, given = part.strip().partition("=")
        benchmark = find_benchmark(name)
        requests.append(Request(benchmark, _given(benchmark, data, given) if given else _found(benchmark, data)))
    names = [request.benchmark.name for request in requests]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{', '.join(sorted(twice))} is asked for more than once")
    return requests


def _given(benchmark: Benchmark, data: Path, given: str) -> tuple[Path, ...]:
    path = data / given
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else sorted(data.glob(given)) or [path]
    if not all(file.is_file() for file in files) or not files:
        raise UserError(f"{benchmark.name}: there is no file {path}")
    return _one(benchmark, files)


def _found(benchmark: Benchmark, data: Path) -> tuple[Path, ...]:
    known = tuple(name.lower() for name in (benchmark.name, *benchmark.files))
    if not data.is_dir():
        raise UserError(f"{data} is no folder; the files of the benchmarks are looked for in one")
    here = sorted(file for kind in KINDS for file in data.glob(kind) if file.name.lower().startswith(known))
    here += sorted(
        file
        for folder in sorted(data.iterdir())
        if folder.is_dir() and folder.name.lower().startswith(known)
        for file in folder.rglob("*.parquet")
    )
    if not here:
        raise UserError(
            f"{data} has no file for {benchmark.name}: none begins with {' or '.join(known)} and ends with .tsv, "
            f".parquet or .yaml; {benchmark.name}=FILE names one"
        )
    return _one(benchmark, here)


def _one(benchmark: Benchmark, files: Sequence[Path]) -> tuple[Path, ...]:
    """The files, if they are parts of one; raises UserError if they are several tables."""
    parquet = all(file.suffix == ".parquet" for file in files)
    tables = {str(file.parent / _SPLIT.sub("", file.name)) for file in files} if parquet else {str(f) for f in files}
    if len(tables) > 1:
        raise UserError(
            f"several files are {benchmark.name}'s: {', '.join(sorted(tables)[:4])}; say which, {benchmark.name}=FILE"
        )
    if files[0].suffix not in (".tsv", ".parquet", ".yaml"):
        raise UserError(f"{files[0]}: ends with none of .tsv, .parquet, .yaml")
    return tuple(files)
