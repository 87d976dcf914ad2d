"""How fast a planned stream is read: text, photographs and videos, samples and pictures a second of one core.

    python benchmarks/data/bench_reading.py

Data sets are made in a temporary folder: 2000 texts, 60 JPEGs of 1600 x 1200 (12 tiles and thumbnail each), 4 videos
of 1280 x 720 at 30 frames a second, one minute long (x264, ultrafast), with a key frame every 250 frames or every 30.
Shards are read through Energon's index, as in training. CPU time of the process, once warm.
"""

import io
import json
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
from bench_images import jpeg, photograph
from PIL import Image

from megatron_eagle.config.data import BlendSource, DataSettings
from megatron_eagle.config.reading import ReadingSettings, VideoSettings
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.frames import frame_times
from megatron_eagle.data.media.video import VideoReader
from megatron_eagle.data.sample.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_eagle.data.stream.planned import PlannedStream

PACKS = 12


def record(number: int, text: str, **media: str) -> str:
    """A line of the JSONL."""
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "It is a thing of beauty. " * 20}]
    return json.dumps({"id": str(number), **media, "conversations": turns}) + "\n"


def film(path: Path, group: int) -> None:
    """A minute of a picture that moves sideways."""
    wide = np.asarray(Image.open(io.BytesIO(jpeg(photograph(3200, 720)))))
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        stream.codec_context.gop_size = group
        stream.codec_context.thread_count = 1  # its threads would outlive the file, and forked children wait for them
        for number in range(1800):
            pixels = np.ascontiguousarray(wide[:, number : number + 1280])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())


def read(name: str, built: Path, tokenizer: Tokenizer) -> None:
    """Reads packs of 16 384 tokens and prints what one second of CPU gives."""
    settings = DataSettings((BlendSource(str(built)),), pack_length=16384, reading=ReadingSettings(degrade=True))
    stream = PlannedStream(settings, tokenizer)
    next(stream)
    started = time.process_time()
    packs = [next(stream) for _ in range(PACKS)]
    seconds = time.process_time() - started
    samples, tiles = sum(len(pack.sample_ids) for pack in packs), sum(len(pack.tiles) for pack in packs)
    print(f"{name:34s} {samples / seconds:8.1f} samples/s {tiles / seconds:8.1f} tiles/s")


def main() -> None:
    """All three kinds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = ["What is it?", "It is a thing of beauty.", "user assistant system"]
        train_sentencepiece(words * 50, folder / "spm.model", 300)
        tokenizer = load_tokenizer("sentencepiece", folder / "spm.model")
        (folder / "text.jsonl").write_text("".join(record(n, "What is it?") for n in range(2000)))
        (folder / "a.jpg").write_bytes(jpeg(photograph(1600, 1200)))
        (folder / "images.jsonl").write_text("".join(record(n, "<image>What is it?", image="a.jpg") for n in range(60)))
        for name in ("text", "images"):
            build_dataset(folder / f"{name}.jsonl", folder / name)
            read(name, folder / name, tokenizer)
        for group in (250, 30):
            film(folder / f"{group}.mp4", group)
            lines = (record(n, "<video>What is it?", video=f"{group}.mp4") for n in range(4))
            (folder / f"{group}.jsonl").write_text("".join(lines))
            build_dataset(folder / f"{group}.jsonl", folder / f"film{group}")
            read(f"videos, key frame every {group}", folder / f"film{group}", tokenizer)
            with VideoReader(FileSlice.whole(folder / f"{group}.mp4")) as reader:
                shown = sum(1 for _ in reader.frames(frame_times(VideoSettings(), reader.info, 60)))
                print(f"  {shown} frames of 1800 shown, {reader.decoded} decoded")


if __name__ == "__main__":
    main()
