"""Contents of samples -> keys of their vectors, which are made where no run before has made them.

A block's pictures are read twice: once for their keys, and those without a vector to be decoded. Vectors are written
down a few batches at a time, so that a kill costs no more than these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_eagle.curation.encoders import Encoder
from megatron_eagle.curation.vectors import VectorStore, key_of
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.images import decode_image
from megatron_eagle.errors import BrokenSample

AT_ONCE = 8  # batches that are held decoded, and written together


@dataclass(frozen=True)
class Embedder:
    """An encoder with the folder of its vectors."""

    encoder: Encoder
    store: VectorStore

    @staticmethod
    def of(encoder: Encoder, cache: str) -> "Embedder":
        """cache: folder that holds a folder for each model."""
        return Embedder(encoder, _store(Path(cache, encoder.name).absolute()))

    def texts(self, texts: Sequence[str]) -> list[int]:
        """A key of each."""
        keys = [key_of(text.encode()) for text in texts]
        by_key = dict(zip(keys, texts, strict=True))
        self._make(self.store.missing(keys), by_key.__getitem__)
        return keys

    def pictures(self, pictures: Sequence[FileSlice]) -> list[int | BrokenSample]:
        """A key of each, or why it cannot be decoded."""
        keys = [_picture_key(picture) for picture in pictures]
        by_key = {key: picture for key, picture in zip(keys, pictures, strict=True) if isinstance(key, int)}
        broken = self._make(self.store.missing(list(by_key)), lambda key: decode_image(by_key[key].read()))
        return [broken.get(key, key) if isinstance(key, int) else key for key in keys]

    def frames(self, frames: Sequence[Image.Image]) -> list[int]:
        """A key of each picture that is decoded already."""
        keys = [key_of(repr(one.size).encode() + one.tobytes()) for one in frames]
        by_key = dict(zip(keys, frames, strict=True))
        self._make(self.store.missing(keys), by_key.__getitem__)
        return keys

    def _make(self, keys: Sequence[int], content: Callable[[int], Any]) -> dict[int, BrokenSample]:
        """Vectors of these keys; returns those whose content is broken."""
        broken: dict[int, BrokenSample] = {}
        many = AT_ONCE * self.encoder.batch
        for start in range(0, len(keys), many):
            contents = {}
            for key in keys[start : start + many]:
                try:
                    contents[key] = content(key)
                except BrokenSample as error:
                    broken[key] = error
            if contents:
                self.store.add(list(contents), self.encoder(list(contents.values())))
        return broken


@lru_cache
def _store(folder: Path) -> VectorStore:
    """One a process: it reads the keys of every part once, not once a block."""
    return VectorStore(folder)


def _picture_key(picture: FileSlice) -> int | BrokenSample:
    try:
        return key_of(picture.read())
    except OSError as error:
        return BrokenSample(f"{picture.path} cannot be read ({error.strerror})")
