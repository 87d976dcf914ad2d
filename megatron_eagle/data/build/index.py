"""Energon's index beside a folder of shards: written for a new data set, and read through to check one."""

import contextlib
import gc
import hashlib
import io
import json
import uuid
from pathlib import Path

from megatron_eagle.data.storage.shards import IDENTITY_FILE, META_FOLDER, shard_counts
from megatron_eagle.errors import UserError


def write_index(folder: Path, shards: list[str]) -> None:
    """Writes Energon's index: what ``energon prepare`` does after its questions, all shards in the split ``train``."""
    from megatron_eagle.compat.energon import prepare_index
    from megatron_eagle.data.stream.energon import CONVERSATION_FORMAT

    # Energon forks processes. One that collected a codec left behind here would wait for threads it does not have.
    gc.freeze()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            prepare_index(folder, shards)
    finally:
        gc.unfreeze()
    kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    # JSON is YAML; Energon reads only the name dataset.yaml.
    dataset = json.dumps({**kind, "subflavors": CONVERSATION_FORMAT}, indent=2)
    (folder / META_FOLDER / "dataset.yaml").write_text(dataset + "\n", encoding="utf-8")
    (folder / IDENTITY_FILE).write_text(_content_uuid(folder, shards), encoding="utf-8")


def _content_uuid(folder: Path, shards: list[str]) -> str:
    """Energon draws a random one; ours follows from the shards, so that a rebuilt data set is still the same one."""
    digest = hashlib.sha256()
    for shard in shards:
        with open(folder / shard, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return str(uuid.UUID(bytes=digest.digest()[:16]))


def check_dataset(path: Path | str, expected: int | None = None) -> int:
    """Reads a data set through Energon once and returns its number of samples.

    Raises UserError if the index promises another number, there are not ``expected`` ones, or one cannot be parsed.
    """
    from megatron.energon import WorkerConfig, get_val_dataset, reraise_exception

    from megatron_eagle.compat.energon import open_loader
    from megatron_eagle.data.stream.energon import CookingTaskEncoder

    promised = sum(shard_counts(path).values())
    workers = WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)
    samples = get_val_dataset(
        str(path), split_part="train", worker_config=workers, batch_size=None, task_encoder=CookingTaskEncoder()
    )
    # The simpler get_loader collects garbage every ten samples, which would take most of the time.
    loader = open_loader(samples, pin_memory=False, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None)
    found = 0
    for sample in loader:
        if sample.reason is not None:
            raise UserError(f"{path}: sample {sample.sample_id!r}: {sample.reason}")
        found += 1
    if found != promised or (expected is not None and found != expected):
        wanted = promised if expected is None else expected
        raise UserError(f"{path}: {found} samples can be read, the index promises {promised}, {wanted} were written")
    return found
