"""Packed greedy generation against the plain way: one question at a time, one token at a time."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.prompt import Prompt, pack_prompts

ANSWER_TOKENS = 5


class SpellingTokenizer:
    """Stands in for a tokenizer where only ids matter: decoding spells them out."""

    vocab_size = 400
    im_start, im_end, image_start, image_end, image_context, pad = 1, 2, 3, 4, 5, 0

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def make_prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(4)
    prompts = []
    for number, tiles in enumerate([1, 0, 2, 1, 0]):
        text = torch.randint(6, 400, (3 + number,), generator=generator).tolist()
        tokens = [*text, 3, *[5] * (16 * tiles), 4, *text] if tiles else text
        pictures = torch.randint(0, 256, (tiles, 3, 64, 64), dtype=torch.uint8, generator=generator)
        prompts.append(Prompt(f"p{number}", tokens, pictures, [len(text) + 1 + 16 * tile for tile in range(tiles)]))
    return prompts


def generate_in_world(recipe_path: str, layout: Layout) -> dict[str, str]:
    from megatron_eagle.compat.platform import install
    from megatron_eagle.evaluation.generate import generate
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.engine import build_chunks

    platform = install()
    groups = initialise(layout, platform, timeout=timedelta(seconds=60))
    model = build_chunks(load_recipe(Path(recipe_path)), layout, platform)[0].eval()
    packs = pack_prompts(make_prompts(), 128, ANSWER_TOKENS)
    answers = generate(
        model, packs, SpellingTokenizer(), groups, platform.device, pack_length=128, answer_tokens=ANSWER_TOKENS
    )
    return {identity: answer.text for pack in answers for identity, answer in pack.items()}


def plainly_in_world(recipe_path: str) -> dict[str, str]:
    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.engine import build_chunks

    platform = install()
    initialise(Layout(), platform, timeout=timedelta(seconds=60))
    model = build_chunks(load_recipe(Path(recipe_path)), Layout(), platform)[0].eval()
    answers = {}
    for prompt in make_prompts():
        tokens = list(prompt.tokens)
        while len(tokens) < len(prompt.tokens) + ANSWER_TOKENS:
            batch = PackedBatch(
                tokens=torch.tensor(tokens),
                labels=torch.full((len(tokens),), IGNORE_LABEL),
                loss_weights=torch.zeros(len(tokens)),
                position_ids=torch.arange(len(tokens)),
                cu_seqlens=torch.tensor([0, len(tokens)], dtype=torch.int32),
                tiles=prompt.tiles,
                tile_slots=torch.tensor(prompt.tile_starts, dtype=torch.int64),
                sample_ids=[prompt.identity],
                useful_tokens=len(tokens),
            )
            with torch.no_grad():
                following = int(model(batch, compute_loss=False).reshape(len(tokens), -1)[-1].argmax())
            if following == SpellingTokenizer.im_end:
                break
            tokens.append(following)
        answers[prompt.identity] = " ".join(map(str, tokens[len(prompt.tokens) :]))
    return answers


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(pp=2), Layout(tp=2), Layout(cp=2)], ids=lambda x: f"tp{x.tp}pp{x.pp}cp{x.cp}"
)
def test_packed_generation_equals_one_at_a_time(small_run, worlds, tmp_path: Path, layout: Layout) -> None:
    recipe = str(small_run.write_recipe(tmp_path / "r.yaml"))
    expected = worlds(1).run(plainly_in_world, recipe)[0]
    assert len(set(expected.values())) > 1, "a model that says the same to everything would prove nothing"
    for answers in worlds(layout.model_parallel_size).run(generate_in_world, recipe, layout):
        assert answers == expected


def test_every_prompt_is_packed_once_and_fits() -> None:
    prompts = make_prompts()
    packs = pack_prompts(prompts, 64, ANSWER_TOKENS)
    assert sorted(prompt.identity for pack in packs for prompt in pack) == [prompt.identity for prompt in prompts]
    assert all(sum(len(prompt.tokens) + ANSWER_TOKENS for prompt in pack) <= 64 for pack in packs)


def test_a_question_longer_than_a_pack_is_named() -> None:
    with pytest.raises(UserError, match="question p2: 44 tokens and 5 for the answer are more than a pack of 48"):
        pack_prompts(make_prompts(), 48, ANSWER_TOKENS)
