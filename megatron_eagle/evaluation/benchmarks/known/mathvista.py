"""MathVista: mathematics in pictures; free text needs a judge."""

from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark, published

BENCHMARK = Benchmark(
    "mathvista",
    "MathVista",
    "mathvista",
    ("MathVista",),
    options="",
    answer_tokens=512,
    published=published(45.3, 54.7, 63.8, 67.8),
)
