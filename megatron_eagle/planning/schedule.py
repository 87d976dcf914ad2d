"""Which forward and backward passes a pipeline stage runs, in the order in which Megatron's schedules issue them.

``forward_backward_pipelining_without_interleaving`` (1F1B: as many forward passes as there are stages behind, then one
backward for one forward) and ``..._with_interleaving`` (each stage has several chunks of layers, taken in groups of
``pp`` microbatches). ``tests/planning/test_schedule.py`` compares both with what training really runs.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Pass:
    """One microbatch through one of the stage's chunks, ``forward`` or ``backward``."""

    kind: Literal["forward", "backward"]
    microbatch: int
    chunk: int


def passes(pp: int, vpp: int | None, pp_rank: int, microbatches: int) -> list[Pass]:
    """Everything that pipeline stage ``pp_rank`` of ``pp`` does in a step of ``microbatches`` packs."""
    chunks = vpp or 1
    table = _table(microbatches, chunks, group=pp) if vpp else [(number, 0) for number in range(microbatches)]
    forward = [Pass("forward", number, chunk) for number, chunk in table]
    backward = [Pass("backward", number, chunks - 1 - chunk) for number, chunk in table]
    ahead = min(_ahead(pp, vpp, pp_rank), len(table))
    order = forward[:ahead]
    for number in range(len(table) - ahead):
        order += [forward[ahead + number], backward[number]]
    return order + backward[len(table) - ahead :]


def _ahead(pp: int, vpp: int | None, pp_rank: int) -> int:
    """Forward passes before the first backward pass has to come."""
    if vpp is None:
        return pp - pp_rank - 1
    return 2 * (pp - pp_rank - 1) + (vpp - 1) * pp


def _table(microbatches: int, chunks: int, *, group: int) -> list[tuple[int, int]]:
    """(microbatch, chunk) of each forward pass: ``group`` microbatches through one chunk, then through the next."""
    return [
        (number, chunk)
        for start in range(0, microbatches, group)
        for chunk in range(chunks)
        for number in range(start, min(start + group, microbatches))
    ]
