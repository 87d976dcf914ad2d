"""Eq. 1 against brute force, in memory that does not grow with the pool."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_eagle.curation import similarity
from megatron_eagle.curation.similarity import Negative, Pairs, best_matches, near_vectors
from megatron_eagle.curation.vectors import unit


def vectors(kind: str, rows: int, dim: int, seed: int) -> Any:
    """Unit vectors: random, in clusters, or most of them pointing away from the others'."""
    rng = np.random.default_rng(seed)
    if kind == "random":
        return unit(rng.normal(size=(rows, dim)).astype(np.float32))
    if kind == "clustered":
        centres = np.random.default_rng(9).normal(size=(40, dim))
        return unit((centres[rng.integers(0, 40, rows)] + 0.4 * rng.normal(size=(rows, dim))).astype(np.float32))
    away = np.random.default_rng(8).normal(size=dim) * (1 if seed % 2 else -1)
    return unit((rng.normal(size=(rows, dim)) + 0.7 * away).astype(np.float32))


def brute(new: Pairs, pool: Pairs, negative: Negative) -> Any:
    products = []
    for own, other in ((new.images, pool.images), (new.texts, pool.texts)):
        cosines = np.asarray(own[:], np.float64) @ np.asarray(other[:], np.float64).T
        products.append(cosines if negative == "literal" else cosines.clip(0))
    return products[0] * products[1]


def sides(kind: str, new: int, pool: int, image: int = 64, text: int = 48) -> tuple[Pairs, Pairs]:
    return (
        Pairs(vectors(kind, new, image, 1), vectors(kind, new, text, 3)),
        Pairs(vectors(kind, pool, image, 2), vectors(kind, pool, text, 4)),
    )


@pytest.mark.parametrize("negative", ["zero", "literal"])
@pytest.mark.parametrize("kind", ["random", "clustered", "negative"])
def test_it_is_brute_force(kind: str, negative: Negative, monkeypatch: Any) -> None:
    monkeypatch.setattr(similarity, "NEW_BLOCK", 130)
    monkeypatch.setattr(similarity, "POOL_BLOCK", 700)
    monkeypatch.setattr(similarity, "TILES", {"cpu": (32, 100)})
    new, pool = sides(kind, 300, 2000)
    found, expected = best_matches(new, pool, 3, negative, "cpu"), brute(new, pool, negative)
    ranked = -np.sort(-expected, axis=1)[:, :3]
    assert np.abs(found.scores - ranked).max() < 1e-6
    assert abs(found.similarity - expected.max(axis=1).mean()) < 1e-6
    assert np.allclose(np.take_along_axis(expected, found.rows, axis=1), found.scores, atol=1e-12)
    assert (np.sign(found.images) * np.sign(found.texts) >= 0).all() or negative == "zero"


def test_both_negative_counts_only_where_the_formula_is_taken_literally() -> None:
    own, away = np.eye(4, dtype=np.float32)[:1], -np.eye(4, dtype=np.float32)[:1]
    assert best_matches(Pairs(own, own), Pairs(away, away), negative="literal").similarity == 1.0
    assert best_matches(Pairs(own, own), Pairs(away, away)).similarity == 0.0


@pytest.mark.long
@pytest.mark.parametrize("kind", ["random", "clustered", "negative"])
def test_it_is_brute_force_at_5000_by_20000(kind: str) -> None:
    new, pool = sides(kind, 5000, 20_000, 512, 384)
    for negative in ("zero", "literal"):
        expected = brute(new, pool, negative).max(axis=1)
        found = best_matches(new, pool, 1, negative, "cpu")
        assert np.abs(found.scores[:, 0] - expected).max() < 1e-6 > abs(found.similarity - expected.mean())


def test_more_matches_than_the_pool_has_and_an_empty_side() -> None:
    new, pool = sides("random", 5, 3)
    assert best_matches(new, pool, 10).rows.shape == (5, 3)
    with pytest.raises(ValueError, match="0 in the pool"):
        best_matches(new, Pairs(pool.images[:0], pool.texts[:0]))
    with pytest.raises(ValueError, match="3 images, 2 texts"):
        Pairs(pool.images, pool.texts[:2])


def test_blocks_are_read_from_disk_one_at_a_time(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(similarity, "POOL_BLOCK", 256)
    new, pool = sides("clustered", 50, 2000)
    for name in ("images", "texts"):
        np.save(tmp_path / f"{name}.npy", getattr(pool, name))
    most: list[int] = []

    class Watched:
        def __init__(self, name: str) -> None:
            self.array = np.load(tmp_path / f"{name}.npy", mmap_mode="r")

        def __len__(self) -> int:
            return len(self.array)

        def __getitem__(self, part: slice) -> Any:
            most.append(len(self.array[part]))
            return self.array[part]

    found = best_matches(new, Pairs(Watched("images"), Watched("texts")), 2)
    assert max(most) == 256
    assert np.array_equal(found.rows, best_matches(new, pool, 2).rows)


def test_all_near_vectors_are_found(monkeypatch: Any) -> None:
    monkeypatch.setattr(similarity, "POOL_BLOCK", 300)
    own = vectors("clustered", 1000, 32, 5)
    cosines = np.triu(own @ own.T, 1)
    least = 0.9
    found = {
        pair for first, second in near_vectors(own, least) for pair in zip(first.tolist(), second.tolist(), strict=True)
    }
    expected = set(zip(*(one.tolist() for one in np.nonzero(cosines >= least)), strict=True))
    assert len(expected) > 100 and len(found ^ expected) <= 2  # at the very border
