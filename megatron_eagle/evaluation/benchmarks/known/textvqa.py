"""TextVQA: questions about text in photographs."""

from megatron_eagle.evaluation.benchmarks.benchmark import PHRASE, Benchmark, published

BENCHMARK = Benchmark("textvqa", "TextVQA", "vqa", ("TextVQA",), PHRASE, published=published(76.6, 79.1, 83.0, 83.7))
