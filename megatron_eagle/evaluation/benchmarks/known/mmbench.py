"""MMBench 1.1: options, each question asked with its options turned around."""

from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark, published

BENCHMARK = Benchmark("mmbench", "MMBench 1.1", "circular", ("MMBench",), published=published(None, None, 80.6, 81.7))
