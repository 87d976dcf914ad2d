"""An export computes what Megatron computes, in a process that has nothing of this project and no network.

For every preset's shape at reduced width, in both formats: logits of a picture of several tiles, two pictures, and a
video, and greedy answers token by token. ``outside_code.py`` is the other process, one for all tests here.
"""

import json
import subprocess
import sys
import sysconfig
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import checkpoint_cases as cases
import outside_code
import pytest
import torch
from PIL import Image, ImageDraw
from tokenizer_folder import QWEN_TOKENS, write_qwen_like

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.reading import Tiling
from megatron_eagle.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.data.media.tiling import cut_tiles
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch
from megatron_eagle.data.sample.tokenizer import EAGLE_TOKENS
from megatron_eagle.evaluation.prompt import Prompt, pack_prompts

NO_LOGITS = Options(logits=False)
TILE, TOKENS_PER_TILE, NEW_TOKENS, PACK = 32, 4, 10, 256
MODELS = {
    f"{shape}, {kind}": (shape, kind, False)
    for shape in cases.SHAPES
    for kind in (("A",) if shape in ("eagle2-9b", "eagle2-34b") else ("A", "B"))
}
MODELS["eagle2-2b, B, output stored beside the embedding it is"] = ("eagle2-2b", "B", True)
MORE = "eagle2-9b, A"


def picture(width, height, seed):
    image = Image.new("RGB", (width, height), (seed * 40 % 256, 120, 200))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 5, height // 4, width // 2, height - 3), fill=(250, 10 * seed % 256, 0))
    draw.line((0, 0, width - seed, height), fill=(255, 255, 255), width=3)
    return image


def drawn():
    """What each conversation shows: tiles of every picture, as training cuts them; a video's frames are a tile each."""
    tiling = Tiling(tile_size=TILE, min_tiles=1, max_tiles=6, rule="area")
    film = torch.cat([cut_tiles(picture(64, 48, second), replace(tiling, max_tiles=1)) for second in range(5)])
    return {
        "a picture": [cut_tiles(picture(150, 90, 1), tiling)],
        "two pictures": [cut_tiles(picture(40, 100, 2), tiling), cut_tiles(picture(30, 31, 3), tiling)],
        "a video": list(film.split(1)),
    }


def prompts_of(vocabulary, image_token, seed):
    """Words drawn at random between the pictures."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, (name, pictures) in enumerate(drawn().items()):
        words = torch.randint(0, vocabulary, (len(pictures) + 1, 5 + 3 * number), generator=generator)
        words[words == image_token] += 1
        tokens, starts = words[0].tolist(), []
        for tiles, more in zip(pictures, words[1:].tolist(), strict=True):
            starts += [len(tokens) + tile * TOKENS_PER_TILE for tile in range(len(tiles))]
            tokens += [image_token] * (TOKENS_PER_TILE * len(tiles)) + more
        found.append(Prompt(name, tokens, torch.cat(pictures), starts))
    return found


def packed(prompts):
    """All of them as one pack; without padding."""
    sizes = [len(prompt.tokens) for prompt in prompts]
    borders = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    pairs = list(zip(prompts, borders, strict=False))
    return PackedBatch(
        tokens=torch.tensor([token for prompt in prompts for token in prompt.tokens]),
        labels=torch.full((borders[-1],), IGNORE_LABEL),
        loss_weights=torch.zeros(borders[-1]),
        position_ids=torch.cat([torch.arange(size) for size in sizes]),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        tiles=torch.cat([prompt.tiles for prompt in prompts]),
        tile_slots=torch.tensor([start + slot for prompt, start in pairs for slot in prompt.tile_starts]),
        sample_ids=[prompt.identity for prompt in prompts],
        useful_tokens=borders[-1],
    )


class SpellingTokenizer:
    """Stands in for a tokenizer where only ids matter: decoding spells them out."""

    pad = 0

    def __init__(self, stop):
        self.im_end = stop

    def decode(self, ids):
        return " ".join(map(str, ids))


def in_megatron(checkpoint, config, prompts, stop):
    """In a process of a world: (logits, answers) as training computes them."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_eagle.checkpoint.files import load_weights
    from megatron_eagle.compat.platform import install
    from megatron_eagle.evaluation.generate import generate
    from megatron_eagle.model.eagle import build_eagle
    from megatron_eagle.parallel.groups import initialise

    platform = install()
    groups = initialise(Layout(), platform, timeout=timedelta(seconds=60))
    model_parallel_cuda_manual_seed(1)
    model = build_eagle(config, Layout(), precision="fp32", pre_process=True, post_process=True, seed=None).eval()
    load_weights(Path(checkpoint), [model])
    with torch.no_grad():
        logits = model(packed(prompts), compute_loss=False)[:, : config.language.vocab_size].clone()
    packs, numbers = pack_prompts(prompts, PACK, NEW_TOKENS), {"pack_length": PACK, "answer_tokens": NEW_TOKENS}
    told = generate(model, packs, SpellingTokenizer(stop), groups, platform.device, **numbers)
    texts = {name: answer.text for pack in told for name, answer in pack.items()}
    return logits, [[int(word) for word in texts[prompt.identity].split()] for prompt in prompts]


@pytest.fixture(scope="module")
def found(worlds, tmp_path_factory):
    """({model: (its prompts, Megatron's logits, Megatron's answers)}, what the other process has)."""
    folder = tmp_path_factory.mktemp("remote_code")
    (folder / "tokenizer").mkdir()
    tokenizer = write_qwen_like(folder / "tokenizer", tokens=[*QWEN_TOKENS[:3], *EAGLE_TOKENS, QWEN_TOKENS[3]])
    ours, models = {}, {}
    for number, (name, (shape, kind, stored)) in enumerate(MODELS.items()):
        config = cases.reduced(shape)
        place = folder / str(number)
        dialect = replace(Dialect.published(config, kind), stored_output=stored)
        cases.write_released(place / "hf", config, dialect, seed=number)
        hf_to_megatron([place / "hf"], place / "in", NO_LOGITS)
        megatron_to_hf(place / "in", place / "out", NO_LOGITS, kind=kind, tokenizer=tokenizer)
        copied = (place / "out").rename(folder / f"copied_{number}")  # nothing is left where it was written
        said = json.loads((copied / "config.json").read_text())
        stop = json.loads((copied / "generation_config.json").read_text())["eos_token_id"]
        prompts = prompts_of(config.language.vocab_size, said["image_token_index"], seed=number)
        (result,) = worlds(1).run(in_megatron, str(place / "in"), config, prompts, stop)
        ours[name] = (prompts, *result)
        rows = [{"tokens": torch.tensor(prompt.tokens), "tiles": prompt.tiles} for prompt in prompts]
        models[name] = {"folder": str(copied), "rows": rows}
    torch.save({"models": models, "new_tokens": NEW_TOKENS, "more": MORE}, folder / "job.pt")
    packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    command = [sys.executable, "-I", "-S", outside_code.__file__, str(folder / "job.pt"), str(folder / "result.pt")]
    done = subprocess.run([*command, *packages], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return ours, torch.load(folder / "result.pt", weights_only=True)


def test_the_other_process_has_nothing_of_this_project(found):
    assert found[1]["imports"] == [] and set(found[1]["models"]) == set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_megatron(found, model):
    """A batch padded on the right."""
    prompts, ours, _ = found[0][model]
    pieces = found[1]["models"][model]["logits"]
    assert [len(piece) for piece in pieces] == [len(prompt.tokens) for prompt in prompts]
    difference = float((torch.cat(pieces) - ours).abs().max())
    print(f"{model}: largest difference {difference:.1e}, largest logit {float(ours.abs().max()):.2f}")
    assert float(ours.std()) > 0.1 and difference <= 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_greedy_answers_are_those_of_training(found, model):
    """A batch padded on the left against questions in the slots of a cache."""
    assert found[1]["models"][model]["answers"] == found[0][model][2]


def test_answers_are_of_some_length_and_not_all_alike(found):
    answers = [answer for _, _, ours in found[0].values() for answer in ours]
    assert sum(len(answer) == NEW_TOKENS for answer in answers) > len(answers) // 2
    assert len({tuple(answer) for answer in answers}) > len(MODELS) and len({t for a in answers for t in a}) > 10


def test_loss_and_its_gradients_with_and_without_recomputing(found):
    more = found[1]["more"]
    shifted = more["logits"][:, :-1].flatten(0, 1), more["labels"][:, 1:].flatten()
    assert torch.allclose(more["loss"], torch.nn.functional.cross_entropy(*shifted), atol=1e-6)
    plain, again = more["gradients"], more["recomputed gradients"]
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []
    assert all(gradient.abs().max() > 0 for name, gradient in plain.items() if "k_proj.bias" not in name)


def test_other_attention_types_and_classes(found):
    more, mask = found[1]["more"], found[1]["more"]["inputs"]["attention_mask"].bool()
    assert torch.allclose(more["eager"][mask], more["logits"][mask], atol=1e-5)
    assert more["bf16"].dtype == torch.bfloat16 and more["auto"] == torch.float32
    assert (more["bf16"].float() - more["logits"])[mask].abs().max() < 0.1 * more["logits"].abs().max()
    assert all(len(answer) == 4 for answer in more["bf16 answers"])
    assert torch.allclose(more["kept"], more["logits"][:, -2:], atol=1e-6)
    assert {"Siglip", "Qwen2Attention"} <= set(more["attention"]) and set(more["attention"].values()) == {"eager"}


def test_without_a_cache_and_with_several_answers(found):
    """Pictures are there at every step without a cache, and each copy of a row has all of the row's tiles in order."""
    more = found[1]["more"]
    assert more["uncached"] == [answer[:6] for answer in found[0][MORE][2]]
    assert more["twice"] == [answer[:6] for answer in found[0][MORE][2] for _ in range(2)]
    assert more["beams"] == more["beams alone"]


def test_a_model_saved_again_loads_by_itself(found):
    more = found[1]["more"]
    assert torch.equal(more["saved"], more["logits"])
    saved, names = Path(more["saved folder"]), ("configuration", "encoders", "modeling")
    said = json.loads((saved / "config.json").read_text())
    assert said["auto_map"]["AutoConfig"] == "configuration_eagle.Eagle2ChatConfig"
    assert {file.name for file in saved.glob("*.py")} == {f"{name}_eagle.py" for name in names}
    hf_to_megatron([saved], saved.with_name("saved_in"), NO_LOGITS)


def test_tiles_that_do_not_fit_the_tokens_are_refused(found):
    fewer, none, both = found[1]["more"]["errors"]
    tokens = sum(prompt.tokens.count(int(fewer.split()[4])) for prompt in found[0][MORE][0])
    tiles = tokens // TOKENS_PER_TILE
    assert f"{tokens} tokens" in fewer and f"pixel_values {tiles - 1} tiles of {TOKENS_PER_TILE} tokens each" in fewer
    assert f"{tokens} tokens" in none and none.endswith("pixel_values 0 tiles")
    assert "inputs_embeds" in both
