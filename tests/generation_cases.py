"""Questions drawn at random, and four ways to answer them: with the cache in any layout, without one, transformers'."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from outside_code import generated, load

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch
from megatron_eagle.evaluation.prompt import Prompt, pack_prompts

TOKENS_PER_TILE, PACK = 4, 256
Said = dict[str, list[int]]


class SpellingTokenizer:
    """Stands in for a tokenizer where only ids matter: decoding spells them out."""

    pad = 0

    def __init__(self, stop: int) -> None:
        self.im_end = stop

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def draw_prompts(count: int, vocabulary: int, image_token: int, side: int = 32) -> list[Prompt]:
    """Of each four one of text only, one with a picture of several tiles, one with two pictures, and one with the
    frames of a video, a tile and some words each; of 3 to some 90 tokens."""
    generator = torch.Generator().manual_seed(vocabulary)

    def draw(most: int, least: int = 1) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    prompts = []
    for number in range(count):
        pictures = [[], [draw(6, 2)], [draw(4), draw(4)], [1] * draw(6, 3)][number % 4]
        tokens: list[int] = []
        starts: list[int] = []
        for tiles in (*pictures, 0):
            words = torch.randint(0, vocabulary - 1, (draw(20, 3),), generator=generator)
            tokens += (words + (words >= image_token)).tolist()
            starts += [len(tokens) + tile * TOKENS_PER_TILE for tile in range(tiles)]
            tokens += [image_token] * (TOKENS_PER_TILE * tiles)
        shape = (len(starts), 3, side, side)
        shown = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        prompts.append(Prompt(f"q{number}", tokens, shown, starts))
    return prompts


def load_exported(folder: Path) -> Any:
    """The model of an exported folder, whose answers nothing stops."""
    model = load(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = -1
    return model


def by_transformers(model: Any, prompts: Sequence[Prompt], new_tokens: int) -> Said:
    """Greedy answers in batches of 20."""
    said: Said = {}
    with torch.no_grad():
        for start in range(0, len(prompts), 20):
            some = prompts[start : start + 20]
            rows = [{"tokens": torch.tensor(prompt.tokens), "tiles": prompt.tiles} for prompt in some]
            answers = generated(model, rows, new_tokens)
            said |= {prompt.identity: answer for prompt, answer in zip(some, answers, strict=True)}
    return said


def start_model(checkpoint: str, config: EagleConfig, layout: Layout) -> tuple[Any, ...]:
    """In every process of a world: (model, encode, groups, platform)."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_eagle.checkpoint.files import load_weights
    from megatron_eagle.compat.platform import install
    from megatron_eagle.model.eagle import build_eagle
    from megatron_eagle.model.tile_encoder import build_tile_encoder
    from megatron_eagle.parallel.groups import initialise

    platform = install()
    groups = initialise(layout, platform, timeout=timedelta(seconds=60))
    model_parallel_cuda_manual_seed(1)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = build_eagle(config, layout, precision="fp32", pre_process=first, post_process=last, seed=None).eval()
    modules, encode = [model], None
    if layout.encoder == "spread":
        alone = {"self_group": groups.self_group, "copies": groups.world_group, "precision": "fp32"}
        encode = build_tile_encoder(config, **alone).eval()
        modules.append(encode)
    load_weights(Path(checkpoint), modules)
    return model, encode, groups, platform


def with_cache(
    checkpoint: str, config: EagleConfig, layout: Layout, prompts: Sequence[Prompt], stop: int, options: dict[str, Any]
) -> Said:
    """In every process of a world: the package's answers. options: those of ``generate``."""
    from megatron_eagle.evaluation.generate import generate

    model, encode, groups, platform = start_model(checkpoint, config, layout)
    packs = pack_prompts(prompts, PACK, options["answer_tokens"])
    told = generate(
        model, packs, SpellingTokenizer(stop), groups, platform.device, pack_length=PACK, encode=encode, **options
    )
    return {name: list(map(int, one.text.split())) for some in told for name, one in some.items()}


def without_cache(checkpoint: str, config: EagleConfig, prompts: Sequence[Prompt], new_tokens: int) -> Said:
    """In a world of one; nothing stops the answers."""
    model, *_ = start_model(checkpoint, config, Layout())
    return by_whole_passes(model, pack_prompts(prompts, PACK, new_tokens), new_tokens)


@torch.no_grad()
def by_whole_passes(model: Any, packs: Sequence[Sequence[Prompt]], new_tokens: int) -> Said:
    """Every token by a pass over all that stands before it, in packs with places for the answers."""
    said: Said = {}
    for pack in packs:
        batch, ends = lay_out(pack, new_tokens)
        features = model.encode(batch.tiles) if len(batch.tiles) else None
        for _ in range(new_tokens):
            following = model(batch, features=features, compute_loss=False)[ends].argmax(dim=-1)
            ends = ends + 1
            batch.tokens[ends] = following
            for prompt, token in zip(pack, following.tolist(), strict=True):
                said.setdefault(prompt.identity, []).append(token)
    return said


def lay_out(pack: Sequence[Prompt], new_tokens: int) -> tuple[PackedBatch, torch.Tensor]:
    """The pack with places for the answers, and where each prompt's last token is."""
    sizes = [len(prompt.tokens) + new_tokens for prompt in pack]
    borders = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    starts = list(zip(pack, borders, strict=False))
    batch = PackedBatch(
        tokens=torch.tensor([token for prompt in pack for token in [*prompt.tokens, *[0] * new_tokens]]),
        labels=torch.full((borders[-1],), IGNORE_LABEL),
        loss_weights=torch.zeros(borders[-1]),
        position_ids=torch.cat([torch.arange(size) for size in sizes]),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        tiles=torch.cat([prompt.tiles for prompt in pack]),
        tile_slots=torch.tensor([start + slot for prompt, start in starts for slot in prompt.tile_starts]).long(),
        sample_ids=[prompt.identity for prompt in pack],
        useful_tokens=borders[-1],
    )
    return batch, torch.tensor([start + len(prompt.tokens) - 1 for prompt, start in starts])


def until(said: Said, stop: int) -> Said:
    """Answers cut before the first ``stop``."""
    return {name: one[: one.index(stop)] if stop in one else one for name, one in said.items()}
