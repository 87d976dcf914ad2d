"""Attention over a pack on a CPU, by its segments: cut by one split, and as before by a slice for each.

    python benchmarks/many_segments.py

Forward and backward of ``model/attention.py`` on one core, four heads of 32, segments of 32 tokens each; milliseconds,
the median of several runs in turn.
"""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_eagle.model import attention
from megatron_eagle.parallel.context import Context, PackMask

SEGMENTS = (1, 10, 100, 1000)
TOKENS, HEADS, CHANNELS, RUNS = 32, 4, 32, 5


def slices(x: Tensor, parts: list[slice]) -> Sequence[Tensor]:
    """As it was: the gradient of each is as long as the pack."""
    return [x[:, :, part] for part in parts]


def seconds(count: int) -> float:
    """Of a pack of ``count`` segments."""
    borders = tuple(TOKENS * number for number in range(count + 1))
    mask = PackMask.of(torch.tensor(borders, dtype=torch.int32), borders, Context())
    query, key, value = (torch.randn(borders[-1], HEADS, CHANNELS, requires_grad=True) for _ in range(3))
    begun = time.perf_counter()
    attention._attend_by_pieces(query, key, value, mask, None).sum().backward()
    return time.perf_counter() - begun


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    ways = {"slices": slices, "split": attention._cut}
    print("| segments | a slice for each | one split |\n|---|---|---|")
    for count in SEGMENTS:
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(RUNS):
            for name, way in ways.items():
                attention._cut = way
                times[name].append(seconds(count))
        cells = " | ".join(f"{1000 * statistics.median(each):.1f}" for each in times.values())
        print(f"| {count} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
