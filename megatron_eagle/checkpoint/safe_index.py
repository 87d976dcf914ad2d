"""A torch_dist checkpoint, read without trust: nothing of a checkpoint from elsewhere may run as code.

``.metadata`` is a pickle, and so is every tensor, every object beside the tensors and every small file; Megatron and
torch load some of them as they are. Here an unpickler that knows the classes of this format and nothing else reads the
index, all others are tried with torch's weights-only loading, and no file name may leave the folder. ``verify`` does so
before Megatron, or a conversion, is let near the files.
"""

import io
import json
import os
import pickle
from collections import defaultdict
from itertools import groupby
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_eagle.checkpoint.checksums import gather, rank_and_size
from megatron_eagle.compat.checkpoint_index import INDEX_CLASSES
from megatron_eagle.errors import UserError

METADATA = ".metadata"
COMMON = "common.pt"  # what is the same in every process
BACKEND = "metadata.json"  # which of Megatron's formats this is
EXTRA_STATE = "_extra_state"  # how the key of what a module keeps beside its weights ends, before ``/shard_0_1``


def read_index(folder: Path) -> Metadata:
    """Which tensors ``folder`` has and where; UserError if it has no index, a damaged one, or one with code in it."""
    file = folder / METADATA
    try:
        index = _Unpickler(io.BytesIO(file.read_bytes())).load()
        names = {entry.relative_path for entry in index.storage_data.values()}
    except FileNotFoundError:
        raise UserError(f"{folder} is not a Megatron checkpoint: it has no {METADATA}") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise UserError(f"{file} is damaged: {error}") from None
    for name in sorted(names):
        check_relative(name, str(file))
    return index


def verify(folder: Path) -> Metadata:
    """``folder``'s index, once all that a load reads of it is known to be there and to be data; collective.

    Raises a UserError in every process that names the shards and files which are missing, too short, or would run code.
    Numbers of tensors are not read: of every pickle only what its unpickler would be asked to make.
    """
    index = read_index(folder)
    _check_backend(folder)
    rank, size = rank_and_size()
    for find in (_short_shards, _unsafe_entries, _unsafe_files):
        problems = [line for part in gather(find(folder, index, rank, size)) for line in part]
        if problems:
            raise UserError("; ".join(sorted(problems)[:3]))
    return index


def _check_backend(folder: Path) -> None:
    """Megatron picks its reader by this file."""
    file = folder / BACKEND
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kinds = (found["sharded_backend"], found.get("common_backend", "torch"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if kinds != ("torch_dist", "torch"):
        raise UserError(f"{file} names the formats {kinds[0]!r} and {kinds[1]!r}; torch_dist and torch are read")


def _short_shards(folder: Path, index: Metadata, rank: int, size: int) -> list[str]:
    ends: dict[str, int] = defaultdict(int)
    for at in index.storage_data.values():
        ends[at.relative_path] = max(ends[at.relative_path], at.offset + at.length)
    problems = []
    for name, end in sorted(ends.items())[rank::size]:
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            problems.append(f"{folder}: the shard {name} is missing ({error.strerror})")
            continue
        if found < end:
            problems.append(f"{folder / name} is truncated: it has {found} bytes of {end}")
    return problems


def _unsafe_entries(folder: Path, index: Metadata, rank: int, size: int) -> list[str]:
    """Tensors, and objects, which Megatron loads with a plain unpickler; an extra state has to be empty.

    Each process takes entries that lie beside each other and opens each of their files once.
    """
    entries = sorted(index.storage_data.items(), key=lambda entry: (entry[1].relative_path, entry[1].offset))
    own = entries[len(entries) * rank // size : len(entries) * (rank + 1) // size]
    problems: list[str] = []
    for name, inside in groupby(own, key=lambda entry: entry[1].relative_path):
        file = folder / name
        try:
            with file.open("rb") as handle:
                found = [_unsafe_entry(handle, key.fqn, at.offset, at.length) for key, at in inside]
        except OSError as error:
            problems.append(f"{file} cannot be read ({error.strerror})")
            continue
        problems += [f"{file} holds {problem}" for problem in found if problem]
    return problems


def _unsafe_entry(handle: BinaryIO, name: str, start: int, length: int) -> str | None:
    try:
        found = _contents(handle, start, length)
    except Exception:  # a damaged pickle raises whatever its bytes happen to mean
        return f"{name}, which cannot be loaded without running code"
    if name.partition("/")[0].endswith(EXTRA_STATE) and not holds_nothing(found):
        return f"{name}, which is not empty: scales of FP8 training are not read"
    return None


def holds_nothing(extra_state: Any) -> bool:
    """Whether a module's extra state is none: None or no bytes, in a checkpoint inside a list."""
    if isinstance(extra_state, list):
        return all(map(holds_nothing, extra_state))
    return extra_state is None or (isinstance(extra_state, torch.Tensor) and not extra_state.numel())


def _unsafe_files(folder: Path, index: Metadata, rank: int, size: int) -> list[str]:
    """The small files beside the shards."""
    files = sorted({folder / COMMON, *folder.glob("*.pt")})[rank::size]
    problems = [f"{file} is missing" for file in files if not file.is_file()]
    return problems + [
        f"{file} cannot be loaded without running code" for file in files if file.is_file() and not _is_data(file)
    ]


def _is_data(file: Path) -> bool:
    """Whether ``_contents`` of it can be had."""
    try:
        with file.open("rb") as handle:
            _contents(handle, 0, file.stat().st_size)
    except Exception:  # a damaged pickle raises whatever its bytes happen to mean
        return False
    return True


def _contents(handle: BinaryIO, start: int, length: int) -> Any:
    """What torch's weights-only unpickler makes of those bytes: tensors, without their numbers, and plain values."""
    # Transformer Engine kept the scales of a layer as a file in memory.
    with torch.serialization.safe_globals([io.BytesIO]), torch.serialization.skip_data():
        region: Any = Region(handle, start, length)
        return torch.load(region, map_location="cpu", weights_only=True)


def check_relative(path: str, where: str) -> None:
    """Refuse a file name that an index could use to point out of its own folder."""
    kinds = (PurePosixPath(path), PureWindowsPath(path))
    if not path or any(kind.is_absolute() or kind.drive or ".." in kind.parts for kind in kinds) or "\0" in path:
        raise UserError(f"{where} names the file {path!r}, which is not inside its folder")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in INDEX_CLASSES.get(module, ()) or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which does not belong into a checkpoint's index")


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


class Region(io.RawIOBase):
    """The bytes of one tensor inside a shard, as a file of its own."""

    def __init__(self, handle: BinaryIO, start: int, length: int) -> None:
        self._handle, self._start, self._length = handle, start, length
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._handle.tell() - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell() if whence == os.SEEK_CUR else 0, os.SEEK_END: self._length}
        self._handle.seek(self._start + base[whence] + offset)
        return self.tell()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self.tell())]
        return self._handle.readinto(view)  # type: ignore[attr-defined]

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._length - self.tell())
        return self._handle.read(rest if size < 0 else min(size, rest))
