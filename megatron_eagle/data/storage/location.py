"""Where a data set lies: a folder of this machine, or ``msc://profile/path`` in an object store.

Object stores are reached through Energon's paths, i.e. NVIDIA's Multi-Storage Client and its configuration file
(S3, Google Cloud Storage, Azure, ...). Reading alone is done there; data sets are built on disk and copied as a whole,
with their ``.nv-meta`` and ``.eagle-meta``.
"""

import io
import math
import mmap
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from megatron.energon.epathlib import EPath
from numpy.typing import NDArray

Location: TypeAlias = Path | EPath
REMOTE = "msc://"


def locate_dataset(path: Path | str | EPath) -> Location:
    """The folder of a data set."""
    if isinstance(path, EPath):
        return path
    # Path("msc://x") would take one of the slashes away.
    return EPath(path) if isinstance(path, str) and path.startswith(REMOTE) else Path(path)


def read_text(file: Location) -> str:
    """A whole text file; raises OSError."""
    return read_bytes(file).decode()


def read_bytes(file: Location) -> bytes:
    """A whole file; raises OSError."""
    with file.open("rb") as stream:
        return bytes(stream.read())


def load_array(file: Location) -> NDArray[Any]:
    """An array of a ``.npy`` file: mapped into memory on this machine, else read; raises OSError or ValueError."""
    if isinstance(file, Path):
        return _map_array(file)
    loaded: NDArray[Any] = np.load(io.BytesIO(read_bytes(file)))
    return loaded


def is_mapped(array: NDArray[Any]) -> bool:
    """Whether ``load_array`` mapped it, so that it takes no memory of its own."""
    return isinstance(array.base, mmap.mmap)


def _map_array(file: Path) -> NDArray[Any]:
    """``np.load(file, mmap_mode="r")`` with the file opened once instead of three times, and a plain array, which is
    faster to look single numbers up in. What ``np.save`` wrote, without objects."""
    with file.open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"{file}: version {version} of the format, 1.0 is read")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        begin = stream.tell()
    if dtype.hasobject or len(mapped) < begin + dtype.itemsize * math.prod(shape):
        raise ValueError(f"{file}: {len(mapped)} bytes are not an array {shape} of {dtype}")
    return np.ndarray(shape, dtype, mapped, begin, order="F" if by_columns else "C")
