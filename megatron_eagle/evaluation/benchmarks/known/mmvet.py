"""MMVet: free answers, which a judge has to score."""

from megatron_eagle.evaluation.benchmarks.benchmark import Benchmark, published

BENCHMARK = Benchmark(
    "mmvet", "MMVet", "judge", ("MMVet", "MM-Vet"), answer_tokens=512, published=published(40.9, 53.8, 62.2, 62.9)
)
