"""OCRBench: reading, scored out of 1000."""

from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark, published

BENCHMARK = Benchmark(
    "ocrbench",
    "OCRBench",
    "containment",
    ("OCRBench",),
    answer_tokens=128,
    scale=1000,
    published=published(767, 818, 868, 869),
)
