"""How much a source has in common with a pool: Eq. 1 of Eagle 2 (arXiv 2501.14818), exact.

S = (1/N) sum_i max_j [cos(image_i, image_j) x cos(text_i, text_j)], i over the new source, j over the pool. High is
redundant. Both matrix products are made tile by tile, multiplied while they are in the cache, and only the best of each
row is kept: memory is a block of either side and does not grow with the pool, which is read once for every block of the
new source. Single precision chooses the best, double precision says how good they are.

Where both cosines are negative their product is positive, though pictures and texts that point away from each other
have nothing in common: ``zero``, the default, takes negative cosines for 0; ``literal`` is the formula as it stands.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_eagle.curation.vectors import Vectors

if TYPE_CHECKING:
    import torch

Negative = Literal["zero", "literal"]
NEW_BLOCK, POOL_BLOCK = 16_384, 8_192  # rows that are held
NEAR_ROWS = 1024  # of a block whose products with another are held
TILES = {"cpu": (512, 1024), "cuda": (8_192, 8_192)}  # products that are held: half a cache of the second level, each


class RowsLike(Protocol):
    """Unit vectors, [rows, dim] in float32: an array, one on disk, or rows of a store."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Any: ...


@dataclass(frozen=True)
class Pairs:
    """images, texts: of the same samples, in the same order."""

    images: RowsLike
    texts: RowsLike

    def __post_init__(self) -> None:
        if len(self.images) != len(self.texts):
            raise ValueError(f"{len(self.images)} images, {len(self.texts)} texts")

    def __len__(self) -> int:
        return len(self.images)

    def read(self, low: int, high: int) -> tuple[Vectors, Vectors]:
        """Rows from ``low`` on."""
        images, texts = (np.array(one[low:high], np.float32) for one in (self.images, self.texts))  # writable, in order
        return images, texts


@dataclass(frozen=True)
class Matches:
    """Of each new sample its best matches in the pool, best first: [N, top] each. rows: of the pool.

    scores: products as Eq. 1 has them. images, texts: cosines.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float64]
    images: NDArray[np.float64]
    texts: NDArray[np.float64]

    @property
    def similarity(self) -> float:
        """S, the mean of the best."""
        return float(self.scores[:, 0].mean())


def best_matches(
    new: Pairs,
    pool: Pairs,
    top: int = 1,
    negative: Negative = "zero",
    device: str = "auto",
    done: Callable[[int], None] = lambda pairs: None,
) -> Matches:
    """Compares every new sample with every one of the pool. done: is told of pairs as they are compared.

    ValueError if one side is empty. Pool samples that are equally good come in the order of the pool, but beyond
    ``top`` it is open which of them are named.
    """
    import torch

    if not len(new) or not len(pool):
        raise ValueError(f"{len(new)} new samples, {len(pool)} in the pool: there is nothing to compare")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    top = min(top, len(pool))
    parts = []
    for low in range(0, len(new), NEW_BLOCK):
        own = new.read(low, low + NEW_BLOCK)
        search = _Search(own, top, negative, device)
        for start in range(0, len(pool), POOL_BLOCK):
            other = pool.read(start, start + POOL_BLOCK)
            search.compare(other, start)
            done(len(own[0]) * len(other[0]))
        parts.append(_exact(own, pool, search.rows.cpu().numpy(), negative))
    return Matches(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class _Search:
    """A block of the new source, with the best of the pool so far."""

    def __init__(self, own: tuple[Vectors, Vectors], top: int, negative: Negative, device: str) -> None:
        import torch

        self._device, self._negative, self._top = device, negative, top
        self._images, self._texts = (torch.from_numpy(one).to(device) for one in own)
        self._high, self._wide = TILES["cuda" if device.startswith("cuda") else "cpu"]
        rows = len(own[0])
        self.rows = torch.zeros((rows, top), dtype=torch.int64, device=device)
        self.scores = torch.full((rows, top), -torch.inf, device=device)
        self._tiles = [torch.empty(self._high * self._wide, device=device) for _ in range(2)]

    def compare(self, other: tuple[Vectors, Vectors], start: int) -> None:
        """With a block of the pool, whose first row is number ``start``."""
        import torch

        images, texts = (torch.from_numpy(one).to(self._device) for one in other)
        for left in range(0, len(images), self._wide):
            across = slice(left, left + self._wide)
            for upper in range(0, len(self._images), self._high):
                down = slice(upper, upper + self._high)
                tile = self._tile(self._images[down], self._texts[down], images[across], texts[across])
                self._take(tile, down, start + left)

    def _tile(self, *parts: "torch.Tensor") -> "torch.Tensor":
        import torch

        images, texts, other_images, other_texts = parts
        shape = (len(images), len(other_images))
        first, second = (tile[: shape[0] * shape[1]].view(shape) for tile in self._tiles)
        torch.mm(images, other_images.T, out=first)
        torch.mm(texts, other_texts.T, out=second)
        if self._negative == "zero":
            first.clamp_(min=0)  # where the text's is below 0 the product is, too, and 0 in the end
        return first.mul_(second)

    def _take(self, tile: "torch.Tensor", down: slice, start: int) -> None:
        """Rows that have something better than what is kept: ever fewer."""
        import torch

        scores, rows = self.scores[down], self.rows[down]
        better = torch.nonzero(tile.amax(1) > scores[:, -1])[:, 0]
        if not len(better):
            return
        found = torch.topk(tile[better], min(self._top, tile.shape[1]), dim=1)
        both = torch.cat([scores[better], found.values], dim=1)
        numbers = torch.cat([rows[better], found.indices + start], dim=1)
        chosen = torch.topk(both, self._top, dim=1)
        scores[better] = chosen.values
        rows[better] = numbers.gather(1, chosen.indices)


def _exact(
    own: tuple[Vectors, Vectors], pool: Pairs, rows: NDArray[np.int64], negative: Negative
) -> tuple[NDArray[Any], ...]:
    """The columns of ``Matches`` for a block, in double precision."""
    wanted, back = np.unique(rows, return_inverse=True)
    images, texts = (np.empty(rows.shape, np.float64) for _ in range(2))
    places = back.reshape(rows.shape)
    for low, part in _gathered(pool, wanted):
        here, column = np.nonzero((places >= low) & (places < low + len(part[0])))
        at = places[here, column] - low
        for out, mine, other in ((images, own[0], part[0]), (texts, own[1], part[1])):
            out[here, column] = np.einsum("ij,ij->i", mine[here], other[at], dtype=np.float64)
    first, second = (images, texts) if negative == "literal" else (images.clip(0), texts.clip(0))
    scores = first * second
    order = np.lexsort((rows, -scores), axis=1)
    return tuple(np.take_along_axis(one, order, axis=1) for one in (rows, scores, images, texts))


def _gathered(pool: Pairs, wanted: NDArray[np.int64]) -> Iterator[tuple[int, tuple[Vectors, Vectors]]]:
    """Rows of the pool in sorted order, as many as are held at once: (place of the first in ``wanted``, vectors)."""
    edges = np.searchsorted(wanted, np.arange(0, len(pool) + POOL_BLOCK, POOL_BLOCK))
    for number, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        if low < high:
            start = number * POOL_BLOCK
            images, texts = pool.read(start, start + POOL_BLOCK)
            at = wanted[low:high] - start
            yield int(low), (images[at], texts[at])


def near_vectors(vectors: RowsLike, least: float, device: str = "auto") -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Indices of all pairs of unit vectors with a cosine of at least ``least``, the lower first; exact.

    Work grows with the square of the vectors: 2 x dim x N x N / 2 operations.
    """
    for first, second in near_across(vectors, vectors, least, device, later=True):
        if (wanted := first < second).any():
            yield first[wanted], second[wanted]


def near_across(
    vectors: RowsLike, others: RowsLike, least: float, device: str = "auto", later: bool = False
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Indices of all pairs, one of either side, with a cosine of at least ``least``.

    later: blocks of ``others`` before that of ``vectors`` are left out, for the sides are the same.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    def block(side: RowsLike, start: int) -> "torch.Tensor":
        return torch.from_numpy(np.array(side[start : start + POOL_BLOCK], np.float32)).to(device)

    for low in range(0, len(vectors), POOL_BLOCK):
        own = block(vectors, low)
        for start in range(low if later else 0, len(others), POOL_BLOCK):
            other = block(others, start)
            for upper in range(0, len(own), NEAR_ROWS):
                first, second = torch.nonzero(own[upper : upper + NEAR_ROWS] @ other.T >= least, as_tuple=True)
                if len(first):
                    yield first.cpu().numpy() + low + upper, second.cpu().numpy() + start
