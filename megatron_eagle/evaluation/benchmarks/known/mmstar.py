"""MMStar: options, questions that need their picture."""

from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark, published

BENCHMARK = Benchmark("mmstar", "MMStar", "choice", ("MMStar",), published=published(48.5, 56.4, 62.6, 66.2))
