"""A stretch of a file, such as one entry of a tar file, that is read only where it is looked at.

Images are small and travel as bytes. A film of three hours does not fit into a reader process beside others, so it
travels as a place on disk: decoding a few hundred frames reads those parts of the file, whatever its length.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

# What is taken for a video by its name; the content decides whether it is one.
VIDEO_ENDINGS = ("mp4", "mkv", "webm", "mov", "avi", "m4v", "mpg", "mpeg", "ts", "flv", "wmv", "ogv", "3gp")


class Openable(Protocol):
    """A local or a remote path: what pathlib's and Energon's paths have in common here."""

    def open(self, mode: str) -> Any: ...


@dataclass(frozen=True)
class FileSlice:
    """``size`` bytes of ``path`` from ``offset`` on."""

    path: Path | Openable
    offset: int
    size: int

    @staticmethod
    def whole(path: Path) -> "FileSlice":
        """A whole file; raises OSError if it cannot be looked at."""
        return FileSlice(path, 0, path.stat().st_size)

    def open(self) -> BinaryIO:
        """A binary file that begins and ends with the slice."""
        return io.BufferedReader(_SliceReader(self))

    def read(self) -> bytes:
        """All bytes of the slice."""
        with self.open() as file:
            return file.read()


class _SliceReader(io.RawIOBase):
    def __init__(self, part: FileSlice) -> None:
        self._part, self._place = part, 0
        self._file = part.path.open("rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._part.size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}, before the beginning")
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._part.size - self._place))
        self._file.seek(self._part.offset + self._place)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
