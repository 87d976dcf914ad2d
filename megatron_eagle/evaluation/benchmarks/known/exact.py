"""Any file of questions with one right answer, which has to be matched exactly."""

from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark

BENCHMARK = Benchmark("exact", "exact matches", "exact", ("exact",), options="")
