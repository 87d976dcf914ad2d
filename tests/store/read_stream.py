"""Reads an epoch of packs in a process of its own; a module by itself, so that it is imported once for all of them."""

import hashlib
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from megatron.energon import local_copy

from megatron_eagle.config.data import BlendSource, DataSettings
from megatron_eagle.config.reading import ReadingSettings
from megatron_eagle.data.sample.tokenizer import load_tokenizer
from megatron_eagle.data.stream.planned import PlannedStream
from megatron_eagle.errors import UserError


def read_stream(
    answer: Connection, paths: list[str], tokenizer: str, workers: int, epochs: int, scratch: Path, packages: str
) -> None:
    """Sends {"sha256": of tokens and pixels, "used": ids, "rejected": [[id, reason]]}, or {"error": line}.

    scratch: with the client's configuration, msc.json, and the copies of indexes. packages: with boto3.
    """
    sys.path.append(packages)
    os.environ["MSC_CONFIG"] = str(scratch / "msc.json")
    local_copy.LOCAL_COPY_TMP_DIR = scratch / "copies"  # otherwise of the environment, when it is imported
    small = {"pack_length": 1024, "tile_size": 64, "tokens_per_tile": 16, "reading": ReadingSettings(degrade=True)}
    sources = tuple(BlendSource(path, repeat=1) for path in paths)
    sha, used, rejected = hashlib.sha256(), [], []
    try:
        stream = PlannedStream(
            DataSettings(sources=sources, **small), load_tokenizer("sentencepiece", tokenizer), workers=workers
        )
        for _ in range(epochs * stream.plan.first_of_epoch(1)):
            pack = next(stream)
            sha.update(pack.tokens.numpy().tobytes() + pack.tiles.numpy().tobytes())
            used += pack.sample_ids
            rejected += pack.rejected
        stream.close()
        answer.send({"sha256": sha.hexdigest(), "used": sorted(used), "rejected": rejected})
    except UserError as error:
        answer.send({"error": str(error)})
