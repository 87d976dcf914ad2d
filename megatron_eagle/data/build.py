"""Conversations in a JSONL file -> a checked data set of Energon WebDataset shards.

What training would stumble over is found here, once: every line is parsed, every image really decoded, and each bad
sample is written to ``rejected.jsonl`` with its line and reason. The same input gives the same bytes. The data set is
made beside its destination and appears there whole or not at all.
"""

import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import tarfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_eagle.data.broken import BrokenSample
from megatron_eagle.data.catalogue import open_catalogue
from megatron_eagle.data.conversation import Conversation, parse_record
from megatron_eagle.data.images import MAX_PIXELS, decode_image, read_extension
from megatron_eagle.data.shards import IDENTITY_FILE, META_FOLDER, sample_key, shard_counts
from megatron_eagle.errors import UserError

REJECTED_FILE = "rejected.jsonl"
SECONDS_BEFORE_PROGRESS = 3.0
LINES_AT_A_TIME = 64  # of each worker; their images are in memory together


@dataclass(frozen=True)
class BuildReport:
    """What became of a JSONL file: lines read (blank ones not counted), samples written, samples rejected."""

    read: int
    written: int
    rejected: int
    shards: int


@dataclass(frozen=True)
class _Line:
    number: int
    data: bytes


@dataclass(frozen=True)
class _Parsed:
    """A line's conversation, or the reason why it is rejected."""

    number: int
    claimed_id: str | int | None
    content: Conversation | str


@dataclass(frozen=True)
class _Image:
    """An image file's bytes and the name ending its format asks for, whatever it was called."""

    extension: str
    data: bytes


def build_dataset(
    samples_jsonl: Path | str,
    out_dir: Path | str,
    *,
    media_root: Path | str | None = None,
    max_rejected: int = 0,
    samples_per_shard: int = 1000,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    progress: bool = True,
) -> BuildReport:
    """Builds ``out_dir`` from ``samples_jsonl``.

    media_root: folder that image paths start from, the JSONL's own by default. Paths that lead out of it, absolute or
        by "..", are rejected, so that a downloaded file cannot pull in private pictures; links inside it are followed.
    max_rejected: rejected samples that are put up with. With more, nothing is built but ``out_dir/rejected.jsonl``.
    max_pixels: larger images are rejected as decompression bombs.
    workers: processes that read and decode images; the shards are the same bytes for any number.

    Raises UserError if too many samples are rejected, none is left, the output cannot be written, or ``out_dir``
    already holds something: a finished data set is never overwritten.
    """
    source, out = Path(samples_jsonl), Path(out_dir)
    _check_output(out)
    root = source.parent if media_root is None else Path(media_root)
    unfinished = out.parent / f".{out.name}.partial"
    with _explained(source, out):
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            report = _Builder(source, root, unfinished, samples_per_shard, max_pixels).run(progress, workers)
            _check_report(report, max_rejected, source, unfinished, out)
            _prepare(unfinished)
            check_dataset(unfinished, report.written)
            open_catalogue(unfinished)
            _appear(unfinished, out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return report


@contextlib.contextmanager
def _explained(source: Path, out: Path) -> Iterator[None]:
    """Says which file the operating system would not read or write."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"cannot build {out} from {source}: {error.strerror or error}{where}") from error


def _check_output(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder")
    if out.is_dir() and any(path.name != REJECTED_FILE for path in out.iterdir()):
        raise UserError(f"{out} already exists and is not empty; remove it or choose another folder")


def _check_report(report: BuildReport, max_rejected: int, source: Path, partial: Path, out: Path) -> None:
    """Lets a report pass, or leaves only the list of rejected samples behind and raises UserError."""
    if report.rejected <= max_rejected and report.written:
        return
    out.mkdir(exist_ok=True)
    os.replace(partial / REJECTED_FILE, out / REJECTED_FILE)
    if report.rejected > max_rejected:
        raise UserError(
            f"{source}: {report.rejected} of {report.read} samples are bad and {max_rejected} are allowed "
            f"(--max-rejected); {out / REJECTED_FILE} lists them"
        )
    raise UserError(
        f"{source}: no usable sample in {report.read} lines, {report.rejected} rejected; see {out / REJECTED_FILE}"
    )


def _appear(partial: Path, out: Path) -> None:
    (out / REJECTED_FILE).unlink(missing_ok=True)
    if out.is_dir():
        out.rmdir()
    os.replace(partial, out)


class _Builder:
    """One pass over the lines: good samples into shards, bad ones into the list."""

    def __init__(self, source: Path, root: Path, out: Path, samples_per_shard: int, max_pixels: int) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard={samples_per_shard} must be at least 1")
        self._source, self._root, self._out = source, root, out
        self._samples_per_shard = samples_per_shard
        self._max_pixels = max_pixels
        self._lines_of: dict[str, int] = {}

    def run(self, progress: bool, workers: int) -> BuildReport:
        read = written = rejected = 0
        with (
            open(self._out / REJECTED_FILE, "w", encoding="utf-8") as bad,
            _ShardWriter(self._out, self._samples_per_shard) as shards,
            _Loaders(workers) as loaders,
        ):
            parsed = map(self._parse_line, self._lines(progress))
            while batch := list(itertools.islice(parsed, LINES_AT_A_TIME * workers)):
                for line, loaded in zip(batch, loaders.load(batch, self._root, self._max_pixels), strict=True):
                    read += 1
                    if isinstance(loaded, str):
                        rejected += 1
                        entry = {"line": line.number, "id": line.claimed_id, "reason": loaded}
                        bad.write(json.dumps({"file": str(self._source), **entry}) + "\n")
                    else:
                        assert isinstance(line.content, Conversation)
                        shards.add(line.content, loaded)
                        written += 1
        return BuildReport(read, written, rejected, shards.finished)

    def _parse_line(self, line: _Line) -> _Parsed:
        record: Any = None
        try:
            record = _parse_json(line)
            return _Parsed(line.number, _claimed_id(record), self._parse(record, line.number))
        except BrokenSample as error:
            return _Parsed(line.number, _claimed_id(record), str(error))

    def _lines(self, progress: bool) -> Iterator[_Line]:
        with (
            open(self._source, "rb") as file,
            tqdm(
                total=self._source.stat().st_size,
                desc=f"building from {self._source.name}",
                unit="B",
                unit_scale=True,
                delay=SECONDS_BEFORE_PROGRESS,
                mininterval=1.0,
                disable=not progress,
            ) as bar,
        ):
            for number, data in enumerate(file, 1):
                if data.strip():
                    yield _Line(number, data)
                bar.update(len(data))

    def _parse(self, record: Any, number: int) -> Conversation:
        conversation = parse_record(record, default_id=f"line-{number}")
        try:
            json.dumps(conversation.extra, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BrokenSample(f"a field holds text that is not Unicode: {error.reason}") from None
        first = self._lines_of.setdefault(conversation.id, number)
        if first != number:
            raise BrokenSample(f"duplicate id {conversation.id!r}, first seen in line {first}")
        return conversation


class _Loaders:
    """Processes that read images, or none for one worker; what they give is in the order of the lines."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise UserError(f"workers={workers} must be at least 1")
        # Fresh processes: this one may hold threads, which do not survive a fork.
        fresh = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=fresh) if workers > 1 else None

    def __enter__(self) -> "_Loaders":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def load(self, batch: list[_Parsed], root: Path, max_pixels: int) -> list[list[_Image] | str]:
        """The images of each line, or why it is rejected."""
        task = partial(_load_images, root=root, max_pixels=max_pixels)
        if self._pool is None:
            return [*map(task, batch)]
        try:
            return [*self._pool.map(task, batch, chunksize=4)]
        except BrokenProcessPool:
            first, last = batch[0].number, batch[-1].number
            raise UserError(
                f"a process that reads images was killed between lines {first} and {last}; out of memory?"
            ) from None


def _load_images(line: _Parsed, root: Path, max_pixels: int) -> list[_Image] | str:
    if isinstance(line.content, str):
        return line.content
    try:
        return [_load_image(name, root, max_pixels) for name in line.content.images]
    except BrokenSample as error:
        return str(error)


def _load_image(name: str, media_root: Path, max_pixels: int) -> _Image:
    """An image file that has been decoded once, to be sure."""
    if "\0" in name:
        raise BrokenSample(f"image path {name!r} holds a NUL character")
    root = os.path.abspath(media_root)
    path = os.path.abspath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        raise BrokenSample(f"image {name} lies outside of the media root {root}")
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise BrokenSample(f"image {name} is missing") from None
    except OSError as error:
        raise BrokenSample(f"image {name} cannot be read: {error.strerror}") from error
    try:
        decode_image(data, max_pixels=max_pixels)
        return _Image(read_extension(data, max_pixels=max_pixels), data)
    except BrokenSample as error:
        raise BrokenSample(f"image {name}: {error}") from error


def _parse_json(line: _Line) -> Any:
    try:
        text = line.data.decode("utf-8-sig" if line.number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise BrokenSample(f"line is not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenSample(f"line is not JSON: {error}") from None


def _claimed_id(record: Any) -> Any:
    """Whatever the record calls its id, as far as it can be listed."""
    claimed = record.get("id") if isinstance(record, dict) else None
    return claimed if isinstance(claimed, str | int) else None


class _ShardWriter:
    """Writes ``shard-000000.tar``, ...; entries have no dates or owners, so bytes depend on content only."""

    def __init__(self, folder: Path, samples_per_shard: int) -> None:
        self._folder, self._samples_per_shard = folder, samples_per_shard
        self._written = 0
        self._tar: tarfile.TarFile | None = None
        self.finished = 0

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            self.finished += 1

    def add(self, conversation: Conversation, images: list[_Image]) -> None:
        if self._written % self._samples_per_shard == 0:
            self._close()
            path = self._folder / f"shard-{self.finished:06d}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed by _close)
        key = sample_key(self._written, conversation.id)
        names = [f"{number}.{image.extension}" for number, image in enumerate(images)]
        record = json.dumps(conversation.to_record(names), ensure_ascii=False)
        self._write(f"{key}.json", record.encode())
        for name, image in zip(names, images, strict=True):
            self._write(f"{key}.{name}", image.data)
        self._written += 1

    def _write(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


def _prepare(folder: Path) -> None:
    """Writes Energon's index: what ``energon prepare`` does after its questions, all shards in the split ``train``."""
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    from megatron_eagle.data.energon import CONVERSATION_FORMAT

    shards = sorted(path.name for path in folder.glob("*.tar"))
    with contextlib.redirect_stdout(io.StringIO()):
        WebdatasetPreparator.prepare_dataset(
            folder, shards, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=min(4, len(shards))
        )
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
    from megatron.energon import WorkerConfig, get_savable_loader, get_val_dataset, reraise_exception

    from megatron_eagle.data.energon import CookingTaskEncoder

    promised = sum(shard_counts(path).values())
    workers = WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)
    samples = get_val_dataset(
        str(path), split_part="train", worker_config=workers, batch_size=None, task_encoder=CookingTaskEncoder()
    )
    # The simpler get_loader collects garbage every ten samples, which would take most of the time.
    loader = get_savable_loader(samples, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None)
    loader.pin_memory = False
    found = 0
    for sample in loader:
        if sample.reason is not None:
            raise UserError(f"{path}: sample {sample.sample_id!r}: {sample.reason}")
        found += 1
    if found != promised or (expected is not None and found != expected):
        wanted = promised if expected is None else expected
        raise UserError(f"{path}: {found} samples can be read, the index promises {promised}, {wanted} were written")
    return found
