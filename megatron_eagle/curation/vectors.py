"""Vectors on disk by the content they were made of: any run finds again what any other has made.

A folder holds parts, two files each: keys (64 bits, a digest of the content; of ten million contents two have one key
with a probability of 3e-6) and their vectors. A part is there once its keys are; what a process that is killed had
not written is made again. Parts are never changed, so that many processes may read and write one folder. They are
memory-mapped: reading holds what was asked for, and 12 bytes a vector for where each lies.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from megatron_eagle.errors import UserError

KEYS, VECTORS = ".keys.npy", ".vectors.npy"
READ = 8192  # vectors that means are made of at a time
Vectors = NDArray[np.float32]


def key_of(content: bytes) -> int:
    """64 bits of a content."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class VectorStore:
    """The vectors of one model. folder: of its parts, made when the first is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[str] = []
        self._keys = np.empty(0, np.uint64)  # sorted
        self._places = np.empty(0, np.uint64)  # part << 32 | row

    def missing(self, keys: Sequence[int]) -> list[int]:
        """Those without a vector, each once, in their order; looks for parts that others have written."""
        self._refresh()
        wanted = np.array(list(dict.fromkeys(keys)), dtype=np.uint64)
        return [int(one) for one in wanted[~self._found(wanted)[0]]]

    def add(self, keys: Sequence[int], vectors: Vectors) -> None:
        """Writes a part. vectors: [len(keys), dim]."""
        if len(keys) != len(vectors) or not np.isfinite(vectors).all():
            raise ValueError(f"{len(keys)} keys, vectors of {vectors.shape}, finite: {np.isfinite(vectors).all()}")
        self.folder.mkdir(parents=True, exist_ok=True)
        part = np.array(keys, dtype=np.uint64)
        name = hashlib.blake2b(part.tobytes(), digest_size=8).hexdigest()
        for ending, data in ((VECTORS, vectors.astype(np.float32, copy=False)), (KEYS, part)):
            unfinished = self.folder / f".{uuid4().hex}"
            with open(unfinished, "wb") as file:
                np.save(file, data, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.folder / f"{name}{ending}")

    def read(self, keys: Sequence[int] | NDArray[np.uint64]) -> Vectors:
        """[len(keys), dim] in the order of the keys, of which there is at least one; UserError if one is not there."""
        wanted = np.asarray(keys, dtype=np.uint64)
        there, places = self._found(wanted)
        if not there.all():
            self._refresh()
            there, places = self._found(wanted)
        if not there.all():
            lost = int((~there).sum())
            raise UserError(f"{self.folder} has no vectors of {lost} of {len(wanted)} contents; was it changed?")
        out: Vectors | None = None
        numbers, rows = places >> np.uint64(32), places & np.uint64(0xFFFFFFFF)
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            part = np.load(self.folder / f"{self._parts[int(number)]}{VECTORS}", mmap_mode="r")
            if out is None:
                out = np.empty((len(wanted), part.shape[1]), np.float32)
            out[here] = part[rows[here].astype(np.int64)]
        assert out is not None
        return out

    def _found(self, wanted: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
        if not len(self._keys):
            return np.zeros(len(wanted), bool), np.zeros(len(wanted), np.uint64)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return self._keys[at] == wanted, self._places[at]

    def _refresh(self) -> None:
        """Takes up parts that were written since; all of them if one has gone."""
        there = {path.name.removesuffix(KEYS) for path in self.folder.glob(f"*{KEYS}") if not path.name.startswith(".")}
        if not there.issuperset(self._parts):
            self._parts, self._keys, self._places = [], np.empty(0, np.uint64), np.empty(0, np.uint64)
        new = sorted(there.difference(self._parts))
        keys, places = [self._keys], [self._places]
        for name in new:
            part = np.load(self.folder / f"{name}{KEYS}")
            keys.append(part)
            places.append((np.uint64(len(self._parts)) << np.uint64(32)) + np.arange(len(part), dtype=np.uint64))
            self._parts.append(name)
        if new:
            every = np.concatenate(keys)
            order = np.argsort(every, kind="stable")
            self._keys, self._places = every[order], np.concatenate(places)[order]


@dataclass(frozen=True)
class StoredRows:
    """Rows of a store in an order of one's own, read where they are sliced: what is compared need not fit into memory,
    and of what means are made of about ``READ`` vectors are held.

    groups: of each row the keys of one or more vectors; the row is their mean, at length 1.
    """

    store: VectorStore
    groups: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, part: slice) -> Vectors:
        groups = self.groups[part]
        sizes = np.array([len(group) for group in groups])
        if not len(sizes):
            return np.empty((0, 0), np.float32)
        if (sizes == 1).all():
            return self.store.read([key for group in groups for key in group])
        borders = np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) // READ)) + 1
        edges = [0, *borders.tolist(), len(groups)]
        return np.concatenate([self._means(groups[low:high]) for low, high in pairwise(edges)])

    def _means(self, groups: Sequence[Sequence[int]]) -> Vectors:
        vectors = self.store.read([key for group in groups for key in group])
        sizes = [len(group) for group in groups]
        return unit(np.add.reduceat(vectors, np.concatenate(([0], np.cumsum(sizes)[:-1])), axis=0))


def unit(vectors: Vectors) -> Vectors:
    """Each row at length 1; one of length 0 stays."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
