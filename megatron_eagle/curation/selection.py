"""Which samples of a group to take: a balanced draw over K-means clusters, a random one, or the farthest points first.

Clusters are those of faiss (the extra ``curate``) on unit vectors. A balanced draw takes the same number from every
cluster, all of those that have fewer, so that rare pictures stay and frequent ones are thinned (Eagle 2, section 3).
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_eagle.curation.vectors import Vectors
from megatron_eagle.errors import UserError

Method = Literal["clusters", "random", "coreset"]
ITERATIONS = 20
BLOCK = 65_536  # rows that distances are held of
JUDGED = 20_000  # vectors that the separation of clusters is judged by


@dataclass(frozen=True)
class Clusters:
    """centres: [K, dim]. of: cluster of each vector. cosines: with its own centre, and with the next, [N] each."""

    centres: Vectors
    of: NDArray[np.int64]
    cosines: NDArray[np.float32]
    next_cosines: NDArray[np.float32]

    @property
    def separation(self) -> float:
        """Simplified silhouette (Hruschka 2004): mean of 1 - distance to the own centre / distance to the next, 0 to 1.

        Distances are 1 - cosine.
        """
        own, other = 1.0 - self.cosines.astype(np.float64), 1.0 - self.next_cosines.astype(np.float64)
        return float(np.mean(1.0 - own.clip(0) / other.clip(1e-12)).clip(0.0, 1.0))


def need_faiss() -> None:
    """UserError if faiss is not installed."""
    if importlib.util.find_spec("faiss") is None:
        raise UserError("clusters need the package faiss-cpu: pip install '.[curate]' beside setup.py")


def cluster(vectors: Vectors, clusters: int, seed: int) -> Clusters:
    """K-means by cosine. vectors: [N, dim] of length 1, N >= clusters. Memory: the vectors, and 256 a cluster again."""
    import faiss

    many, dim = vectors.shape
    if many < clusters:
        raise ValueError(f"{clusters} clusters of {many} vectors")
    means = faiss.Kmeans(dim, clusters, niter=ITERATIONS, seed=seed, spherical=True, min_points_per_centroid=1)
    means.train(vectors)
    centroids: NDArray[np.float32] = np.asarray(means.centroids)
    index = faiss.IndexFlatIP(dim)
    index.add(centroids)
    of, own, other = np.empty(many, np.int64), np.empty(many, np.float32), np.empty(many, np.float32)
    near = min(2, clusters)
    for low in range(0, many, BLOCK):
        cosines, numbers = index.search(vectors[low : low + BLOCK], near)
        part = slice(low, low + len(cosines))
        of[part], own[part], other[part] = numbers[:, 0], cosines[:, 0], cosines[:, -1] if near > 1 else -1.0
    return Clusters(centroids.copy(), of, own, other)


def balanced(sizes: NDArray[np.int64], target: int) -> NDArray[np.int64]:
    """How many to take of each: as even as can be, none more than it has, ``target`` in all (at most the sum)."""
    quota = np.zeros_like(sizes)
    left = min(int(target), int(sizes.sum()))
    order = np.argsort(sizes, kind="stable")
    for place, number in enumerate(order):  # the smallest first: what one lacks the larger ones give
        quota[number] = min(int(sizes[number]), left // (len(order) - place))
        left -= int(quota[number])
    for number in order[::-1]:
        if left and quota[number] < sizes[number]:
            quota[number] += 1
            left -= 1
    return quota


def draw_balanced(of: NDArray[np.int64], target: int, seed: int) -> NDArray[np.int64]:
    """Sorted indices of ``target`` members, drawn at random within each cluster."""
    rng = np.random.default_rng(seed)
    numbers, sizes = np.unique(of, return_counts=True)
    quota = balanced(sizes.astype(np.int64), target)
    order = np.argsort(of, kind="stable")
    ends = np.cumsum(sizes)
    chosen = [
        rng.permutation(order[end - size : end])[:take] for size, end, take in zip(sizes, ends, quota, strict=True)
    ]
    return np.sort(np.concatenate(chosen)) if len(numbers) else np.empty(0, np.int64)


def draw_random(many: int, target: int, seed: int) -> NDArray[np.int64]:
    """Sorted indices of ``target`` of ``many``."""
    return np.sort(np.random.default_rng(seed).permutation(many)[:target])


def farthest_first(vectors: Vectors, target: int, seed: int) -> NDArray[np.int64]:
    """Sorted indices of a greedy k-centre coreset (Gonzalez 1985): each next is the one farthest from all chosen.

    Work: 2 x N x dim x target operations, a pass over all vectors for each that is taken.
    """
    chosen = [int(np.random.default_rng(seed).integers(len(vectors)))]
    nearest = vectors @ vectors[chosen[0]]
    nearest[chosen[0]] = np.inf
    while len(chosen) < target:
        chosen.append(int(np.argmin(nearest)))
        np.maximum(nearest, vectors @ vectors[chosen[-1]], out=nearest)
        nearest[chosen[-1]] = np.inf
    return np.sort(np.array(chosen[:target], dtype=np.int64))


def coverage(vectors: Vectors, chosen: NDArray[Any], seed: int) -> float:
    """Mean cosine of (at most ``JUDGED``) vectors with the nearest chosen one."""
    judged = vectors[draw_random(len(vectors), JUDGED, seed)]
    best = np.full(len(judged), -1.0, np.float32)
    for low in range(0, len(chosen), BLOCK // 8):
        part = vectors[chosen[low : low + BLOCK // 8]]
        for start in range(0, len(judged), 1024):
            rows = slice(start, start + 1024)
            best[rows] = np.maximum(best[rows], (judged[rows] @ part.T).max(axis=1))
    return float(best.astype(np.float64).mean())
