"""Small conversation data sets for the tests of the data room: JSONL, images, and data sets built from them."""

import io
import json
import random
from pathlib import Path

from PIL import Image

from megatron_eagle.data.build import build_dataset
from megatron_eagle.data.tokenizer import SentencePieceTokenizer, train_sentencepiece

COLOURS = ["red", "green", "blue", "yellow"]


def image_bytes(size: tuple[int, int], colour: str, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


def write_jsonl(folder: Path, records: list[dict | bytes], name: str = "samples.jsonl") -> Path:
    path = folder / name
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def question(sample_id: str, text: str, answer: str, image: str | list[str] | None = None, **fields) -> dict:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": sample_id, **({} if image is None else {"image": image}), "conversations": turns, **fields}


def make_records(folder: Path, count: int, prefix: str = "s", seed: int = 0) -> list[dict]:
    """One image, two images and text only in turn, sizes from one tile to twelve; images are written to ``folder``."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        names = []
        for part in range((1, 2, 0, 1)[number % 4]):
            format = rng.choice(["PNG", "JPEG"])
            names.append(f"{prefix}{number}-{part}.{format.lower()}")
            size = (rng.randint(20, 400), rng.randint(20, 300))
            (folder / names[-1]).write_bytes(image_bytes(size, rng.choice(COLOURS), format))
        text = "".join("<image>\n" for _ in names) + f"What is number {number}?" + " please" * rng.randint(0, 12)
        records.append(question(f"{prefix}{number}", text, f"It is {rng.choice(COLOURS)}.", names, task="colour"))
    return records


def make_dataset(folder: Path, count: int, prefix: str = "s", seed: int = 0, samples_per_shard: int = 10) -> Path:
    folder.mkdir(parents=True)
    jsonl = write_jsonl(folder, make_records(folder, count, prefix, seed))
    build_dataset(jsonl, folder / "built", samples_per_shard=samples_per_shard)
    return folder / "built"


def make_tokenizer(folder: Path) -> SentencePieceTokenizer:
    corpus = [f"user assistant system What is number {n}? please It is {c}." for n in range(30) for c in COLOURS]
    train_sentencepiece([*corpus, "You are a helpful assistant."], folder / "spm.model", 400)
    return SentencePieceTokenizer(folder / "spm.model")
