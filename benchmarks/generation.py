"""New tokens a second: whole passes without a cache, the package's cache, and transformers' generate with its own.

    OMP_NUM_THREADS=1 python benchmarks/generation.py benchmarks/reports [--short]

One process, one thread, fp32, the same random weights and prompts: a model of 0.1 B parameters, 8 prompts of 512
tokens with a picture of two tiles each, 64 tokens of answer that nothing cuts short. Whole passes are so slow that two
questions say a few tokens with them: every pass costs the same. Seconds are the processor's own, so that other work on
the machine counts little. Writes <date>-generation.md.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # whole passes are the tests' oracle
import checkpoint_cases
from generation_cases import (
    Said,
    SpellingTokenizer,
    by_transformers,
    by_whole_passes,
    load_exported,
    start_model,
)
from step_time import processor
from tokenizer_folder import QWEN_TOKENS, write_qwen_like

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig, QwenConfig
from megatron_eagle.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.data.sample.tokenizer import EAGLE_TOKENS
from megatron_eagle.evaluation.generate import generate
from megatron_eagle.evaluation.prompt import Prompt, pack_prompts
from megatron_eagle.model.eagle import count_parameters
from megatron_eagle.parallel.process_pool import World
from megatron_eagle.planning.report import markdown

PROMPT, ANSWER, PROMPTS, TILES, TOKENS_PER_TILE = 512, 64, 8, 2, 4
LANGUAGE = QwenConfig(
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    vocab_size=32_768,
    tie_word_embeddings=True,
)
EAGLE = EagleConfig(tile_size=32, encoders=(checkpoint_cases.SIGLIP, checkpoint_cases.CONVNEXT), language=LANGUAGE)


def draw(image_token: int, count: int) -> list[Prompt]:
    """Words at random behind a picture."""
    generator = torch.Generator().manual_seed(0)
    image = TILES * TOKENS_PER_TILE
    prompts = []
    for number in range(count):
        words = torch.randint(1000, LANGUAGE.vocab_size, (PROMPT - image,), generator=generator)
        tiles = torch.randint(0, 256, (TILES, 3, 32, 32), dtype=torch.uint8, generator=generator)
        starts = [tile * TOKENS_PER_TILE for tile in range(TILES)]
        prompts.append(Prompt(str(number), [image_token] * image + words.tolist(), tiles, starts))
    return prompts


def timed(say: Callable[[], Said]) -> tuple[float, Said]:
    """(new tokens a second of the processor, what was said)."""
    started = time.process_time()
    said = say()
    return sum(map(len, said.values())) / (time.process_time() - started), said


def measure(checkpoint: str, exported: str, prompts: list[Prompt], few: int) -> dict[str, float]:
    """Rates of the three ways; RuntimeError if they say different things."""
    model, _, groups, platform = start_model(checkpoint, EAGLE, Layout())
    outside, tokenizer = load_exported(Path(exported)), SpellingTokenizer(stop=-1)
    packs = pack_prompts(prompts, 2 * (PROMPT + ANSWER), ANSWER)

    def cached() -> Said:
        numbers = {"pack_length": 2 * (PROMPT + ANSWER), "answer_tokens": ANSWER}
        told = generate(model, packs, tokenizer, groups, platform.device, **numbers)
        return {name: list(map(int, one.text.split())) for some in told for name, one in some.items()}

    rates: dict[str, float] = {}
    rates["cache"], ours = timed(cached)
    print(f"cache: {rates['cache']:.1f} tokens/s", flush=True)
    rates["transformers"], theirs = timed(lambda: by_transformers(outside, prompts, ANSWER))
    print(f"transformers: {rates['transformers']:.1f} tokens/s", flush=True)
    if ours != theirs:
        raise RuntimeError("the cache and transformers say different things")
    rates["whole passes"], beginnings = timed(lambda: by_whole_passes(model, packs[:1], few))
    print(f"whole passes: {rates['whole passes']:.2f} tokens/s", flush=True)
    if any(ours[name][:few] != said for name, said in beginnings.items()):
        raise RuntimeError("the cache and whole passes say different things")
    return rates


def main(folder: Path, short: bool) -> None:
    """Make the model in both forms, measure, write the report."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "tokenizer").mkdir()
        tokens = [*QWEN_TOKENS[:3], *EAGLE_TOKENS, QWEN_TOKENS[3]]
        tokenizer = write_qwen_like(place / "tokenizer", tokens=tokens)
        checkpoint_cases.write_released(place / "hf", EAGLE, Dialect.published(EAGLE, "A"))
        hf_to_megatron([place / "hf"], place / "in", Options(logits=False))
        megatron_to_hf(place / "in", place / "out", Options(logits=False), kind="A", tokenizer=tokenizer)
        image_token = json.loads((place / "out" / "config.json").read_text())["image_token_index"]
        prompts = draw(image_token, 2 if short else PROMPTS)
        world = World(1)
        (rates,) = world.run(measure, str(place / "in"), str(place / "out"), prompts, 1 if short else 4, timeout=3000)
        world.stop()
    rows = [
        [name, f"{rates[name]:.1f}", f"{rates[name] / rates['whole passes']:.0f}"]
        for name in ("whole passes", "transformers", "cache")
    ]
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    text = (
        f"# New tokens a second, {date}\n\n"
        "`OMP_NUM_THREADS=1 python benchmarks/generation.py benchmarks/reports`, one process with one thread on "
        f"{processor()}, other work beside it; fp32, {sum(count_parameters(EAGLE).values()) / 1e6:.0f} M parameters, "
        f"{len(prompts)} prompts of {PROMPT} tokens with {TILES} tiles each, answers of {ANSWER} tokens. "
        "Prompts and encoders are part of the time. All three ways said the same tokens.\n\n"
        + markdown(["way", "new tokens per processor second", "times whole passes"], rows)
        + "\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{date}-generation.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--short" in sys.argv)
