"""The benchmarks there are: a file of ``known/`` each, found by its name."""

import importlib
from pathlib import Path

from megatron_eagle.config.schema import meant
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark

PACKAGE = "megatron_eagle.evaluation.benchmarks.known"


def benchmark_names() -> list[str]:
    """All of them, in alphabetical order."""
    folder = Path(__file__).parent / "known"
    return sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))


def find_benchmark(name: str) -> Benchmark:
    """The benchmark ``name``; raises UserError with all names."""
    names = benchmark_names()
    if name not in names:
        raise UserError(f"no benchmark {name!r}; there are {', '.join(names)}{meant(name, names)}")
    found: Benchmark = importlib.import_module(f"{PACKAGE}.{name}").BENCHMARK
    return found
