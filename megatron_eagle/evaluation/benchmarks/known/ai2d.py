"""AI2D: options, diagrams of school books."""

from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark, published

BENCHMARK = Benchmark("ai2d", "AI2D", "choice", ("AI2D",), published=published(70.9, 79.3, 83.9, 84.5))
