"""The index of a torch_dist checkpoint, read without trust: nothing of a checkpoint from elsewhere may run as code.

``.metadata`` is a pickle, and so are the small objects beside the tensors; Megatron and torch load both as they come.
Here an unpickler that knows the classes of this format and nothing else reads the index, objects are tried with torch's
weights-only loading, and no file name may leave the folder. ``verify`` does so before Megatron is let near the files.
"""

import io
import os
import pickle
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_eagle.checkpoint.checksums import gather, place
from megatron_eagle.compat.checkpoint_index import INDEX_CLASSES
from megatron_eagle.errors import UserError

METADATA = ".metadata"


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


def verify(folder: Path) -> None:
    """Raise a UserError in every process unless all that ``folder`` holds is data; all processes call this together."""
    index = read_index(folder)
    rank, size = place()
    objects = sorted(key for key, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata))
    mine = set(objects[rank::size])
    found = [
        f"{folder / where.relative_path} holds {key}, which cannot be loaded without running code"
        for key, where in ((at.fqn, where) for at, where in index.storage_data.items())
        if key in mine and not _is_plain(folder / where.relative_path, where)
    ]
    problems = [line for part in gather(found) for line in part]
    if problems:
        raise UserError("; ".join(sorted(problems)[:3]))


def _is_plain(file: Path, where: Any) -> bool:
    try:
        # Transformer Engine keeps the scales of a layer as a file in memory.
        with file.open("rb") as handle, torch.serialization.safe_globals([io.BytesIO]):
            region: Any = Region(handle, where.offset, where.length)
            torch.load(region, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError):
        return False
    return True


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
