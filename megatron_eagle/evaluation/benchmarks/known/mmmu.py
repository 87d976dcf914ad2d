"""MMMU: questions of college courses, options or free; published of its validation split."""

from megatron_eagle.evaluation.benchmarks.benchmark import PHRASE, Benchmark, published

BENCHMARK = Benchmark(
    "mmmu", "MMMU", "mmmu", ("MMMU",), PHRASE, split="validation", published=published(38.8, 43.1, 56.1, 55.8)
)
