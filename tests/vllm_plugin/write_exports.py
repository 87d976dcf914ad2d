"""Writes what the tests of the vLLM plug-in compare with: exports at reduced width, and conversations as training reads
them.

Runs where the trainer is installed (``make test-vllm``); the tests run where vLLM is. In the folder that is named:

    NAME/                 an export, from ``convert megatron-to-hf``; NAME as in ``MODELS``
    NAME.npz              of the export in the code that it carries: ``features``, of the tiles of conversation 3, and
                          ``answerN`` and ``logprobsN``, tokens of a greedy answer to conversation N and how likely
    conversations.json    messages, the files that they show, and token ids up to where the answer begins
    tiles.npz             ``N``: the tiles of conversation N, uint8 [tiles, 3, side, side]
    media/                the files
"""

import json
import sys
from pathlib import Path
from typing import Any

import checkpoint_cases as cases
import numpy as np
import torch
from PIL import Image
from samples import make_settings, write_video
from tokenizer_folder import write_qwen_like
from transformers import AutoModelForCausalLM, AutoProcessor

from megatron_eagle.config.model import EagleConfig, QwenConfig, tokens_per_tile
from megatron_eagle.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_eagle.conversion.processor_files import RELEASED
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.conversion.tokenizer_files import copy_tokenizer
from megatron_eagle.data.sample.conversation import Conversation, Turn
from megatron_eagle.data.sample.tokenizer import EAGLE_TOKENS, HuggingFaceTokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.shards import StoredSample
from megatron_eagle.data.stream.encode import add_tiles, tokenise

MIXTURE = (cases.SIGLIP, cases.CONVNEXT)
MODELS = {  # encoders, format, tied
    "mixture": (MIXTURE, "A", False),
    "mixture-tied": (MIXTURE, "A", True),
    "siglip": ((cases.SIGLIP,), "B", False),
    "siglip-tied": ((cases.SIGLIP,), "B", True),
}
TILE_SIZE = 32
Read = tuple[list[int], torch.Tensor]  # token ids and tiles of a conversation
ANSWER = "It is red."  # to where it begins, conversations are read
ANSWER_TOKENS = 12
# Turns by turns, user and assistant in turn; a system turn begins with "system: ".
CONVERSATIONS: tuple[tuple[str, ...], ...] = (
    ("<image>\nWhat shape is it?",),
    ("What shape is it?\n<image>",),
    ("<image>How many? <image>\nCompare the two images.",),
    ("Read <image>", "A triangle.", "<image>\nAnd this one? <image>"),
    ("system: You are brief.", "<video>\nWhat colour is the square?"),
    ("<video>Compare <video>", "12.", "<image>\n<video> Is it here, too? é"),
)


def write_media(folder: Path) -> dict[str, list[Path]]:
    """Pictures of several shapes, one lying on its side, one transparent, and videos."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(7)
    sizes = ((40, 40), (100, 35), (31, 90), (200, 120), (64, 160), (33, 32))
    pictures = []
    for number, (width, height) in enumerate(sizes):
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
        file = folder / f"{number}.{'jpg' if number == 1 else 'png'}"
        if number == 1:
            exif = Image.Exif()
            exif[0x0112] = 6
            coarse.save(file, exif=exif)
        else:
            (coarse.convert("RGBA") if number == 2 else coarse).save(file)
        if number == 2:
            clear = Image.open(file)
            clear.putalpha(120)
            clear.save(file)
        pictures.append(file)
    films = [write_video(folder / f"{n}.mp4", frames, rate) for n, (frames, rate) in enumerate(((31, 10), (20, 5)))]
    return {"image": pictures, "video": films}


def small(encoders: tuple[Any, ...], tied: bool, rows: int) -> EagleConfig:
    """A model of these encoders and ``rows`` tokens."""
    language = QwenConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32, the least that vLLM's attention on a CPU takes
        num_key_value_heads=1,
        vocab_size=rows,
        tie_word_embeddings=tied,
    )
    return EagleConfig(tile_size=TILE_SIZE, encoders=encoders, language=language)


def write_model(folder: Path, config: EagleConfig, kind: Any, tokenizer: Path) -> None:
    """An export of random weights, through both directions of the conversion."""
    parts = folder.with_name(f"{folder.name}.parts")
    cases.write_released(parts / "hf", config, Dialect.published(config, kind))
    hf_to_megatron([parts / "hf"], parts / "megatron", Options(logits=False))
    megatron_to_hf(parts / "megatron", folder, Options(logits=False), kind=kind, tokenizer=tokenizer)


def write_conversations(
    folder: Path, media: dict[str, list[Path]], tokenizer: Path, tokens_per_tile: int
) -> list[Read]:
    """Each conversation as messages and as the trainer reads it; media are taken in turn."""
    settings = make_settings(
        folder,
        pack_length=1 << 16,
        tile_size=TILE_SIZE,
        tokens_per_tile=tokens_per_tile,
        tiling_rule=RELEASED.tiling_rule,
    )
    planner = VisualPlanner(settings, HuggingFaceTokenizer(tokenizer))
    written: list[dict[str, Any]] = []
    tiles: dict[str, Any] = {}
    taken = {"image": 0, "video": 0}
    for number, texts in enumerate(CONVERSATIONS):
        shown: dict[str, list[Path]] = {"image": [], "video": []}
        for kind, own in shown.items():
            for _ in range(sum(text.count(f"<{kind}>") for text in texts)):
                own.append(media[kind][taken[kind] % len(media[kind])])
                taken[kind] += 1
        roles = ["system"] * texts[0].startswith("system: ") + ["user", "assistant"] * len(texts)
        turns = [Turn(role, text.removeprefix("system: ")) for role, text in zip(roles, texts, strict=False)]
        names = {kind: tuple(file.name for file in own) for kind, own in shown.items()}
        conversation = Conversation(
            str(number), names["image"], (*turns, Turn("assistant", ANSWER)), videos=names["video"]
        )
        stored = StoredSample(conversation, *(tuple(file.read_bytes() for file in own) for own in shown.values()))
        segment, plan = tokenise(stored, planner, prompt=True)
        tiles[str(number)] = add_tiles(segment, stored, plan, settings).tiles.numpy()
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        written.append({"messages": messages, **names, "ids": segment.tokens.tolist()})
    (folder / "conversations.json").write_text(json.dumps(written), encoding="utf-8")
    np.savez(folder / "tiles.npz", **tiles)
    return [(one["ids"], torch.from_numpy(tiles[str(number)])) for number, one in enumerate(written)]


@torch.no_grad()
def write_answers(folder: Path, conversations: list[Read]) -> None:
    """What an export says in the code that it carries, as anybody loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    normalise = AutoProcessor.from_pretrained(folder, trust_remote_code=True).image_processor.normalise
    found: dict[str, Any] = {"features": model.get_image_features(normalise(conversations[3][1])).numpy()}
    for number, (ids, tiles) in enumerate(conversations):
        given = torch.tensor([ids])
        said = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            pixel_values=normalise(tiles),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        answer = said.sequences[0, len(ids) :]
        logprobs = torch.cat(said.logits).log_softmax(-1)
        found |= {
            f"answer{number}": answer.numpy(),
            f"logprobs{number}": logprobs.gather(1, answer[:, None])[:, 0].numpy(),
        }
    np.savez(folder.with_suffix(".npz"), **found)


def main(folder: Path) -> None:
    tokenizer = folder / "tokenizer"
    (folder / "plain").mkdir(parents=True)
    vocabulary = copy_tokenizer(write_qwen_like(folder / "plain"), tokenizer, EAGLE_TOKENS)
    configs = {name: small(encoders, tied, vocabulary.rows) for name, (encoders, _, tied) in MODELS.items()}
    for name, (_, kind, _) in MODELS.items():
        write_model(folder / name, configs[name], kind, tokenizer)
    (tokens,) = set(map(tokens_per_tile, configs.values()))
    conversations = write_conversations(folder, write_media(folder / "media"), tokenizer, tokens)
    for name in MODELS:
        write_answers(folder / name, conversations)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
