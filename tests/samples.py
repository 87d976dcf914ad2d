"""Small conversation data sets for the tests of the data package: JSONL, images, and data sets built from them."""

import io
import json
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_eagle.config.data import BlendSource, DataSettings
from megatron_eagle.config.reading import ReadingSettings
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.sample.tokenizer import SentencePieceTokenizer, train_sentencepiece


def pdf_bytes(pictures: list[Image.Image], dots: int = 72) -> bytes:
    """A PDF of one picture a page, ``dots`` pixels an inch, written by Pillow."""
    buffer = io.BytesIO()
    pictures[0].save(buffer, "PDF", save_all=True, append_images=pictures[1:], resolution=dots, quality=95)
    return buffer.getvalue()


COLOURS = ["red", "green", "blue", "yellow"]


def image_bytes(size: tuple[int, int], colour: str, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


def make_settings(*sources: BlendSource | Path | str, **values: Any) -> DataSettings:
    """Settings of a stream of these data sets; ``values`` are those of DataSettings and of its reading block alike."""
    own = {field.name for field in fields(DataSettings)}
    reading = ReadingSettings(**{name: value for name, value in values.items() if name not in own})
    blend = tuple(source if isinstance(source, BlendSource) else BlendSource(str(source)) for source in sources)
    return DataSettings(sources=blend, reading=reading, **{n: value for n, value in values.items() if n in own})


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


BITS = 12  # of a frame's number, which its picture spells


def write_video(
    path: Path, frames: int, rate: int = 10, *, codec: str = "mpeg4", group: int = 12, turned: int = 0
) -> Path:
    """A video whose frame k shows the bits of k as black and white blocks of 16 pixels, lowest first, below a bar that
    is white on its left half; ``group`` frames from one key frame to the next."""
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = BITS * 16, 32, "yuv420p"
        stream.codec_context.gop_size = group
        # An encoder's threads outlive its file until it is collected; a forked child (Energon's index) waits for them.
        stream.codec_context.thread_count = 1
        if turned:
            stream.set_display_rotation(turned)
        container.start_encoding()  # writes the header, also if no frame follows
        for number in range(frames):
            pixels = np.zeros((32, BITS * 16, 3), np.uint8)
            pixels[:16, : BITS * 8] = 255
            pixels[16:] = np.repeat([255 * (number >> bit & 1) for bit in range(BITS)], 16)[None, :, None]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return path


def frame_number(picture: np.ndarray) -> int:
    """The number that a frame [H, W, 3], of any size, spells."""
    row = picture[picture.shape[0] * 3 // 4].mean(axis=-1)
    return sum(1 << bit for bit in range(BITS) if row[int((bit + 0.5) * len(row) / BITS)] > 127)
