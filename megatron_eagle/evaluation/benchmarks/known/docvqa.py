"""DocVQA: questions about scanned pages."""

from megatron_eagle.evaluation.benchmarks.benchmark import PHRASE, Benchmark, published

BENCHMARK = Benchmark(
    "docvqa",
    "DocVQA",
    "anls",
    ("DocVQA",),
    PHRASE,
    answer_tokens=32,
    submission="rrc",
    published=published(81.8, 88.0, 92.6, 94.1),
)
