"""A fingerprint of the stream: sha256 over the sample ids of the first packs, as the ranks really read them.

Equal digests for other numbers of ranks and reader processes are what "resumable at any size" means.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_eagle.data.stream.planned import PlannedStream
from megatron_eagle.data.stream.streams import Stream
from megatron_eagle.errors import UserError

OpenRank = Callable[[int], Stream]


@dataclass(frozen=True)
class Digest:
    """sha256 of the ids of all samples that were read, in the order of the plan; how many, and how many were broken."""

    sha256: str
    packs: int
    samples: int
    rejected: int


def read_digest(open_rank: OpenRank, ranks: int, packs: int, batch: int) -> Digest:
    """Reads the first ``packs`` packs of a stream that ``ranks`` ranks share, ``batch`` packs a step, rank by rank.

    Raises UserError for a stream that is not planned.
    """
    ids: dict[int, list[str]] = {}
    rejected = 0
    steps = -(-packs // batch)
    for rank in range(ranks):
        stream = open_rank(rank)
        try:
            if not isinstance(stream, PlannedStream):
                raise UserError("only reading.order=planned has one order for every number of ranks, this is buffer")
            for number, own, bad in read_steps(stream, steps * batch // ranks):
                if number < packs:
                    ids[number] = own
                    rejected += bad
        finally:
            stream.close()
    return Digest(digest_of(ids.items()), len(ids), sum(map(len, ids.values())), rejected)


def read_steps(stream: PlannedStream, packs: int) -> Iterable[tuple[int, list[str], int]]:
    """(number, ids, broken samples) of the next ``packs`` packs of one rank."""
    for _ in range(packs):
        number = stream.next_number
        batch = next(stream)
        yield number, batch.sample_ids, len(batch.rejected)


def digest_of(packs: Iterable[tuple[int, list[str]]]) -> str:
    """sha256, in hex, of the packs' ids in the order of their numbers."""
    digest = hashlib.sha256()
    for number, ids in sorted(packs):
        digest.update(json.dumps([number, ids]).encode() + b"\n")
    return digest.hexdigest()
