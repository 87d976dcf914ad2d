"""Reading from an object store: files and stretches of them, each held against the length it must have.

NVIDIA's Multi-Storage Client asks again after answers that are slow, cut off or say 429, 500 or 503, as its profile
says, and keeps what it read if that has a ``cache``. Four things are done here because it does them in another way:

- a file that is opened with it is downloaded as a whole, for every sample: only stretches are asked for;
- an answer with fewer bytes than were asked for, and a length that agrees, is taken for the end of the file, and may be
  kept in the cache as that; one whose checksum is wrong is an error: both are asked for again;
- in a process that was forked its clients still hold the sockets of the other one: they are looked up for each read;
- what could not be read is any of six kinds of error: a file that is not there is ``FileNotFoundError``, a store that
  does not deliver is ``UnreachableStore``, in one line.
"""

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import multistorageclient
from megatron.energon.epathlib import EPath
from multistorageclient.types import Range, RetryableError

from megatron_eagle.compat.energon import copy_once
from megatron_eagle.compat.multi_storage_client import came_damaged, forget_cached
from megatron_eagle.errors import UnreachableStore

TRIES = 3  # of what comes short or damaged; how often the client asks is in its profile
READ_AHEAD = 1 << 20  # bytes that a file asks for at least

Answer = TypeVar("Answer")


def open_profile(path: str) -> EPath:
    """A path ``msc://profile/...``; UnreachableStore if there is no such profile or it cannot be used."""
    try:
        return EPath(path)
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        raise UnreachableStore(f"{path}: {_one_line(error)}") from error


def file_size(file: EPath) -> int:
    """Bytes of a file. FileNotFoundError, UnreachableStore."""
    return int(_ask(file, lambda client, path: client.info(path).content_length))


def read_file(file: EPath) -> bytes:
    """A whole file. FileNotFoundError, UnreachableStore."""
    size = file_size(file)
    return read_range(file, 0, size) if size else b""


def read_range(file: EPath, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset`` on. OSError if the file is not there or ends before; UnreachableStore."""

    def ask(client: Any, path: str) -> tuple[bytes, int]:
        data = bytes(client.read(path, byte_range=Range(offset, size)))
        return data, len(data)

    data, found = _ask_until_whole(file, size, ask)
    if data is not None:
        return data
    ends = file_size(file)
    if ends < offset + size:
        raise OSError(f"{file} has {ends} bytes, {size} from {offset} on were to be read")
    raise UnreachableStore(f"{file}: {found} of {size} bytes from {offset} on came as they should, {TRIES} times")


def local_copy(file: EPath) -> Path:
    """A copy on this machine, made once for all its processes. FileNotFoundError, UnreachableStore."""

    def ask(client: Any, path: str) -> tuple[Path, int]:
        copy = copy_once(file)
        found = copy.stat().st_size
        if found != size:
            copy.unlink(missing_ok=True)
        return copy, found

    size = file_size(file)
    copy, found = _ask_until_whole(file, size, ask)
    if copy is None:
        raise UnreachableStore(f"{file}: {found} of {size} bytes came as they should, {TRIES} times")
    return copy


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store for whoever opens files; what is read of it is asked for in stretches of READ_AHEAD."""

    path: EPath

    @property
    def name(self) -> str:
        """As of a path."""
        return self.path.name

    def open(self, mode: str) -> BinaryIO:
        """To be read as bytes. FileNotFoundError, UnreachableStore."""
        if mode != "rb":
            raise ValueError(f"{self.path}: an object store is only read, not opened as {mode!r}")
        return io.BufferedReader(_Stretches(self.path), READ_AHEAD)


class _Stretches(io.RawIOBase):
    def __init__(self, path: EPath) -> None:
        self._path, self._size, self._place = path, file_size(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._place))
        if wanted:
            buffer[:wanted] = read_range(self._path, self._place, wanted)
        self._place += wanted
        return wanted


def _ask_until_whole(
    file: EPath, size: int, question: Callable[[Any, str], tuple[Answer, int]]
) -> tuple[Answer | None, int]:
    """The first answer of ``size``, as ``question`` says of each, or None; and the size of the last one."""
    found = 0
    for _ in range(TRIES):
        with contextlib.suppress(_CameDamaged):
            answer, found = _ask(file, question)
            if found == size:
                return answer, found
        _ask(file, forget_cached)
    return None, found


class _CameDamaged(UnreachableStore):
    pass


def _ask(file: EPath, question: Callable[[Any, str], Answer]) -> Answer:
    """The answer to ``question(client, path)``."""
    try:
        # Not the client that ``file`` holds: it may be that of the process which this one was forked from.
        return question(*multistorageclient.resolve_storage_client(file.url))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is not there") from None
    except (
        RetryableError,
        RuntimeError,
        ValueError,
        OSError,
    ) as error:
        kind = _CameDamaged if came_damaged(error) else UnreachableStore
        raise kind(f"{file} cannot be read: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    """The innermost reason, which names the cause, after the outermost, which names the request."""
    text = f"{type(error).__name__}: {error}"
    if error.__cause__ is not None and str(error.__cause__) not in text:
        text += f" ({error.__cause__})"
    return " ".join(text.split())[:500]
