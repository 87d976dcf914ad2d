"""RealWorldQA: options, photographs from the road and elsewhere."""

from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark, published

BENCHMARK = Benchmark(
    "realworldqa", "RealWorldQA", "choice", ("RealWorldQA",), published=published(55.4, 63.1, 69.3, 76.7)
)
