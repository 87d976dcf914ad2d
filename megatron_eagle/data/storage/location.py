"""Where a data set lies: a folder of this machine, or ``msc://profile/path`` in an object store.

Object stores are reached through Energon's paths, i.e. NVIDIA's Multi-Storage Client and its configuration file
(S3, Google Cloud Storage, Azure, ...). Reading alone is done there (``object_store.py``); data sets are built on disk
and copied as a whole, with their ``.nv-meta`` and ``.eagle-meta``.
"""

import io
import math
import mmap
import os
import re
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from megatron.energon.epathlib import EPath
from numpy.typing import NDArray

from megatron_eagle.data.storage.object_store import RemoteFile, open_profile, read_file, read_range

Location: TypeAlias = Path | EPath
REMOTE = "msc://"
# Of a .npy file with one or two sides: numbers, row by row.
USUAL_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<|][iuf]\d)', 'fortran_order': False, 'shape': \((\d+),(?: (\d+))?\), \} *\n",
    re.DOTALL,
)
MOST_HEADER = 10 + (1 << 16)  # bytes


def locate_dataset(path: Path | str | EPath) -> Location:
    """The folder of a data set."""
    if isinstance(path, EPath):
        return path
    # Path("msc://x") would take one of the slashes away.
    return open_profile(path) if isinstance(path, str) and path.startswith(REMOTE) else Path(path)


def read_text(file: Location) -> str:
    """A whole text file; raises OSError, and UnreachableStore."""
    return read_bytes(file).decode()


def read_bytes(file: Location) -> bytes:
    """A whole file; raises OSError, and UnreachableStore."""
    return file.read_bytes() if isinstance(file, Path) else read_file(file)


def read_stretch(file: Location, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset`` on; raises OSError, also if there are fewer, and UnreachableStore."""
    if not isinstance(file, Path):
        return read_range(file, offset, size)
    with open(file, "rb", buffering=0) as stream:
        data = os.pread(stream.fileno(), size, offset)
    if len(data) < size:
        raise OSError(f"ends {size - len(data)} bytes before it should")
    return data


def openable(file: Location) -> Path | RemoteFile:
    """What has ``open("rb")`` and ``name``; of a file in a store only what is read is asked for."""
    return file if isinstance(file, Path) else RemoteFile(file)


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
    faster to look single numbers up in. What ``np.save`` wrote, without objects.

    A window of a plan opens nine arrays of each source, so the header is read by its usual form, which takes a quarter
    of the time of numpy's reading it as Python.
    """
    with file.open("rb", buffering=0) as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    usual = USUAL_HEADER.match(mapped)
    if usual is None:
        return _map_unusual(file, mapped)
    dtype, *sides = usual.groups()
    shape = tuple(int(side) for side in sides if side is not None)
    return _array_in(file, mapped, shape, np.dtype(dtype.decode()), usual.end(), "C")


def _map_unusual(file: Path, mapped: mmap.mmap) -> NDArray[Any]:
    stream = io.BytesIO(mapped[:MOST_HEADER])
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"{file}: version {version} of the format, 1.0 is read")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    return _array_in(file, mapped, shape, dtype, stream.tell(), "F" if by_columns else "C")


def _array_in(
    file: Path, mapped: mmap.mmap, shape: tuple[int, ...], dtype: np.dtype[Any], begin: int, order: Literal["C", "F"]
) -> NDArray[Any]:
    if dtype.hasobject or len(mapped) < begin + dtype.itemsize * math.prod(shape):
        raise ValueError(f"{file}: {len(mapped)} bytes are not an array {shape} of {dtype}")
    return np.ndarray(shape, dtype, mapped, begin, order=order)
