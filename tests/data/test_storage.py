"""Data sets in an object store: the same stream through NVIDIA's Multi-Storage Client as from disk.

The store is a folder behind the client's ``file`` provider; its cloud providers need accounts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from samples import make_dataset, make_tokenizer, question, write_jsonl, write_video

from megatron_eagle.data.build.dataset import build_dataset

# Digest of a stream, and of one by Energon's buffer; the configuration is read when Energon is imported.
READ = """
import hashlib, json, sys
from megatron_eagle.data.stream.digest import read_digest
from megatron_eagle.data.stream.planned import PlannedStream
from megatron_eagle.config.data import DataSettings, BlendSource
from megatron_eagle.config.reading import ReadingSettings
from megatron_eagle.data.stream.streams import PackStream
from megatron_eagle.data.sample.tokenizer import load_tokenizer
paths, tokenizer = sys.argv[2:], load_tokenizer("sentencepiece", sys.argv[1])
small = {"pack_length": 1024, "tile_size": 64, "tokens_per_tile": 16}
settings = DataSettings(sources=tuple(map(BlendSource, paths)), reading=ReadingSettings(degrade=True), **small)
opened = lambda rank: PlannedStream(settings, tokenizer, rank=rank, world_size=2, batch=2)
digest = read_digest(opened, 2, 6, 2)
tiles = hashlib.sha256(b"".join(next(opened(0)).tiles.numpy().tobytes() for _ in range(1))).hexdigest()
reading = ReadingSettings(degrade=True, order="buffer", packing_buffer=16)
buffered = PackStream(DataSettings(sources=settings.sources, reading=reading, **small), tokenizer)
print(json.dumps([digest.sha256, digest.samples, digest.rejected, tiles, next(buffered).sample_ids]))
"""


@pytest.mark.slow
def test_a_stream_from_an_object_store(tmp_path):
    bucket = tmp_path / "bucket"
    make_dataset(bucket / "pictures", 24)
    (bucket / "films").mkdir()
    write_video(bucket / "films" / "a.mp4", 100)
    records = [question(f"f{number}", "<video>What?", "It.", video="a.mp4") for number in range(3)]
    build_dataset(write_jsonl(bucket / "films", records), bucket / "films" / "built")
    make_tokenizer(tmp_path)
    provider = {"type": "file", "options": {"base_path": str(bucket)}}
    (tmp_path / "msc.json").write_text(json.dumps({"profiles": {"store": {"storage_provider": provider}}}))
    environment = {
        **os.environ,
        "MSC_CONFIG": str(tmp_path / "msc.json"),
        "ENERGON_LOCAL_COPY_TMP_DIR": str(tmp_path / "copies"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }

    def read(root):
        command = [sys.executable, "-c", READ, str(tmp_path / "spm.model")]
        command += [f"{root}/{name}/built" for name in ("pictures", "films")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    remote, local = read("msc://store"), read(bucket)
    assert remote == local and remote[1] >= 10 and remote[2] == 0
