"""InfoVQA: questions about infographics."""

from megatron_eagle.evaluation.benchmarks.benchmark import PHRASE, Benchmark, published

BENCHMARK = Benchmark(
    "infovqa",
    "InfoVQA",
    "anls",
    ("InfoVQA", "InfographicVQA"),
    PHRASE,
    answer_tokens=32,
    submission="rrc",
    published=published(54.8, 65.8, 77.2, 80.4),
)
