"""The files of a checkpoint: each process writes its own, rank 0 makes a whole one of them.

Nothing here talks to other processes. ``write`` runs in a thread beside training; ``publish`` on rank 0 when all have
written. Failures are told with the file and the free bytes, because a full disk is the one that happens.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig

from megatron_eagle.checkpoint import checksums
from megatron_eagle.checkpoint.best import Best, note_if_best, read_best
from megatron_eagle.checkpoint.files import DESCRIPTION, LATEST, TOKENIZER, Description
from megatron_eagle.checkpoint.safe_index import BACKEND, COMMON, METADATA
from megatron_eagle.compat.checkpoint_saving import FileSystemWriterAsync, write_bucket

PARTIAL = ".partial"


@dataclass
class Save:
    """One checkpoint on its way to the disk.

    index, writer: what becomes ``.metadata`` (rank 0) and who writes it. common: what is the same in every process.
    buckets: copies of this process's tensors, by file. small: its other files' content. tokenizer: files by name.
    partial: the folder it is written in. scored: as what it may become the best.
    thread, results, measured, error: who writes, and what came of it.
    """

    description: Description
    final: Path
    partial: Path
    index: Any
    writer: FileSystemWriterAsync
    common: dict[str, Any]
    buckets: list[Any]
    small: dict[str, Any]
    tokenizer: dict[str, bytes]
    started: float
    scored: Best | None = None
    thread: Thread | None = None
    results: list[Any] = field(default_factory=list)
    measured: dict[str, dict[str, int]] = field(default_factory=dict)
    error: str | None = None


def write(save: Save) -> None:
    """In the thread: write this process's files, make sure that they are on the disk, and measure them."""
    file = save.partial
    try:
        files = []
        for number, bucket in enumerate(save.buckets):
            file = Path(bucket[0])
            save.results += write_bucket(save.writer, number, bucket)
            files.append(file)
        save.buckets = []  # the copy is needed no more
        for name, value in save.small.items():
            file = save.partial / name
            _save(value, file)
            files.append(file)
        save.measured = checksums.measure(files)
    except Exception as error:  # whatever it is, training has to hear of it
        save.error = describe_failure(file, error)


def _save(value: Any, file: Path) -> None:
    with file.open("wb") as handle:
        torch.save(value, handle)
        handle.flush()
        os.fsync(handle.fileno())


def describe_failure(file: Path, error: BaseException) -> str:
    """What happened to ``file``, and how many bytes are free; torch hides the system's error behind its own."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__cause__ or cause.__context__
    reason = cause.strerror if isinstance(cause, OSError) else " ".join(str(error).split())[:200]
    try:
        free = f"{shutil.disk_usage(file if file.exists() else file.parent).free:,} bytes free"
    except OSError as failure:
        free = f"free bytes unknown: {failure.strerror}"
    return f"cannot write {file}: {reason} ({free})"


def start_partial(partial: Path) -> None:
    """Make the folder to write into; what saves that did not get through have left goes."""
    for leftover in partial.parent.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def publish(save: Save, parts: list[Any], keep: int) -> None:
    """Make a whole checkpoint of what all processes have written, and move ``latest`` to it."""
    partial, final = save.partial, save.final
    save.writer.finish(save.index, [results for results, _ in parts])
    _save(save.common, partial / COMMON)
    torch_dist = CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1)
    texts = {BACKEND: asdict(torch_dist), DESCRIPTION: asdict(save.description)}
    for name, content in texts.items():
        (partial / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    tokenizer = _write_tokenizer(partial / TOKENIZER, save.tokenizer)
    small = [partial / name for name in (METADATA, COMMON, *texts)]
    measured = {name: entry for _, part in parts for name, entry in part.items()}
    carried = {f"{TOKENIZER}/{name}": entry for name, entry in checksums.measure(tokenizer).items()}
    checksums.write(partial, {**measured, **checksums.measure(small), **carried})
    for file in (*small, *tokenizer, partial / checksums.CHECKSUMS, partial):
        _flush(file)
    if final.exists():
        _put_away(final)
    partial.rename(final)
    _flush(final.parent)
    pointer = final.parent / f"{LATEST}.new"
    pointer.write_text(final.name, encoding="utf-8")
    _flush(pointer)
    pointer.rename(final.parent / LATEST)
    _flush(final.parent)
    keep_best_and_newest(final, save.scored, keep)


def keep_best_and_newest(final: Path, scored: Best | None, keep: int) -> None:
    """Put checkpoints before ``final`` away but for ``keep`` - 1 and the best, which ``scored`` may make ``final``."""
    if scored is not None:
        note_if_best(final.parent, scored)
    older = sorted(folder for folder in final.parent.glob("step_*[0-9]") if folder.name < final.name)
    best = read_best(final.parent)
    for old in older[: max(0, len(older) + 1 - keep)]:
        if best is None or old.name != best.name:
            _put_away(old)


def _write_tokenizer(folder: Path, files: dict[str, bytes]) -> list[Path]:
    if files:
        folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def _put_away(checkpoint: Path) -> None:
    """Delete; a half deleted checkpoint must not look like a whole one, so it loses its name first."""
    away = checkpoint.with_name(f"{checkpoint.name}.old{PARTIAL}")
    checkpoint.rename(away)
    shutil.rmtree(away)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
