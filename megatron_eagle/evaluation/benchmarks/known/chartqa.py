"""ChartQA: questions about charts."""

from megatron_eagle.evaluation.benchmarks.benchmark import WORD, Benchmark, published

BENCHMARK = Benchmark("chartqa", "ChartQA", "relaxed", ("ChartQA",), WORD, published=published(77.0, 82.0, 86.4, 87.5))
