"""HallusionBench: yes or no, about what a picture does not show."""

from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark, published

BENCHMARK = Benchmark(
    "hallusionbench",
    "HallusionBench",
    "hallusion",
    ("HallusionBench",),
    answer_tokens=128,
    pictures_only=True,
    published=published(35.3, 45.8, 49.3, 54.7),
)
