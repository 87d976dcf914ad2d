"""PlannedStream: packs in the order of a plan, read at random through Energon's index, resumable at any size.

What a rank reads follows from the plan, the step and its rank; reader processes only fetch what they are told, so their
number changes nothing. A position is a count of packs, and the window that the next one is in, so that continuing plans
one window wherever it is. A broken sample leaves a gap in its own pack and moves no other.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from megatron_eagle.config.data import DataSettings
from megatron_eagle.data.order.balance_ranks import balance_ranks
from megatron_eagle.data.order.plan import ORDER_FORMAT, Plan, PlannedPack, WindowStart
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.data.stream.pack_reader import PackReader
from megatron_eagle.data.stream.position import deciding, differences, read_position
from megatron_eagle.errors import UnreachableStore, UserError

PACKS_AHEAD = 2  # of each reader process

# Of every stream whose saved position names none: they could not be set then.
COSTS_BEFORE = {"attention_parity": 65_000, "tile_cost": 0.0}


class PlannedStream(Iterator[PackedBatch]):
    """Packs for data-parallel rank ``rank`` of ``world_size``.

    batch: packs of a step over all ranks; a step's packs are dealt by cost (``balance_ranks``). One a rank by default.
    seed: decides the order. workers: reader processes; 0 reads in this process.
    Raises UserError for sources that cannot be used, and later if ``reading.max_rejected_in_a_row`` samples in a row
    are broken or a reader process dies or hangs.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: Tokenizer,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        workers: int = 0,
        batch: int | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not among {world_size} data-parallel ranks")
        self._batch = world_size if batch is None else batch
        if self._batch % world_size:
            raise ValueError(f"batch={batch} packs cannot be shared out evenly to {world_size} ranks")
        self._settings, self._rank, self._world_size, self._workers = settings, rank, world_size, workers
        self._plan = Plan(settings, tokenizer, seed)
        self._identity = {
            "sources": [
                [identity, source.weight, source.repeat]
                for identity, source in zip(self._plan.identities, settings.sources, strict=True)
            ],
            "settings": deciding(settings, "planned"),
            "order_format": ORDER_FORMAT,
            "tokenizer": tokenizer.fingerprint,
            "seed": seed,
        }
        # Reader processes are forked, and CUDA does not survive that: only the trainer itself decodes on its GPU.
        on_gpu = settings.reading.decoder == "dali" and not workers and torch.cuda.is_available()
        self._costs = {"attention_parity": settings.attention_parity, "tile_cost": settings.tile_cost}
        self._plan.share([self._identity, self._costs])
        self._reader = PackReader(settings, tokenizer, torch.cuda.current_device() if on_gpu else None)
        self._taken = 0  # packs of this rank
        self._in_a_row = 0
        self._packs: Iterator[PackedBatch] | None = None

    @property
    def plan(self) -> Plan:
        return self._plan

    @property
    def next_number(self) -> int:
        """Number of the pack that comes next, in the order of the plan."""
        step, place = divmod(self._taken, self._batch // self._world_size)
        return self._share(step)[place]

    def _share(self, step: int) -> list[int]:
        """Numbers of this rank's packs of a step, ascending."""
        first = step * self._batch
        if self._batch == self._world_size == 1:
            return [first]
        costs = [self._plan.cost(number) for number in range(first, first + self._batch)]
        return [first + i for i in balance_ranks(costs, self._world_size)[self._rank]]

    def _orders(self) -> Iterator[PlannedPack]:
        step, place = divmod(self._taken, self._batch // self._world_size)
        while True:
            for number in self._share(step)[place:]:
                yield self._plan.pack(number)
            step, place = step + 1, 0

    def _open(self) -> Iterator[PackedBatch]:
        if not self._workers:
            return map(self._reader.__getitem__, self._orders())
        loader: DataLoader[PackedBatch] = DataLoader(
            self._reader,
            batch_size=None,
            sampler=_Orders(self._orders()),
            num_workers=self._workers,
            prefetch_factor=PACKS_AHEAD,
            collate_fn=_as_it_is,
            timeout=self._settings.reading.reader_timeout,
        )
        return iter(loader)

    def __next__(self) -> PackedBatch:
        if self._packs is None:
            self._packs = self._open()
        try:
            batch = next(self._packs)
        except RuntimeError as error:
            # torch's only words for a reader process that hangs or was killed; our own errors carry their traceback.
            if "DataLoader" not in str(error) or "Caught " in str(error):
                raise
            raise UserError(f"a reader process hangs or died: {error}; {self._due()}") from error
        except UnreachableStore as error:
            # Of a reader process torch makes the traceback there, whose last line is "module.UnreachableStore: words".
            words = str(error).strip().splitlines()[-1].rpartition(f"{UnreachableStore.__name__}: ")[2]
            raise UnreachableStore(f"{words}; {self._due()}") from error
        self._check(batch)
        self._taken += 1
        self._in_a_row = 0 if batch.sample_ids else self._in_a_row + len(batch.rejected)
        if self._in_a_row >= self._settings.reading.max_rejected_in_a_row:
            sample_id, reason = batch.rejected[-1]
            raise UserError(f"{self._in_a_row} samples in a row are broken, the last is {sample_id!r}: {reason}")
        return batch

    def _check(self, batch: PackedBatch) -> None:
        """Read = used + rejected, sample by sample: what the plan put into this pack is there, or named as rejected.

        A plan holds every sample of an epoch, so what holds for each pack holds for all epochs of all ranks.
        """
        pack = self._plan.pack(self.next_number)
        planned = Counter([*(sample.id for sample in pack.samples), *(sample for sample, _ in pack.rejected)])
        found = Counter([*batch.sample_ids, *(sample for sample, _ in batch.rejected)])
        if planned != found:
            missing, foreign = ([*(a - b).elements()][:5] for a, b in ((planned, found), (found, planned)))
            raise RuntimeError(
                f"pack {pack.number} should account for {planned.total()} samples and does for {found.total()}; "
                f"missing {missing}, not planned {foreign}"
            )

    def _due(self) -> str:
        pack = self._plan.pack(self.next_number)
        ids = ", ".join(sample.id for sample in pack.samples[:20])
        return f"pack {pack.number} was due, of samples {ids}"

    def state(self) -> bytes:
        """The position after the pack returned last, as JSON; the same on all ranks between two steps."""
        step, place = divmod(self._taken, self._batch // self._world_size)
        position = {"packs": step * self._batch, "of_next_step": place, "batch": self._batch, "ranks": self._world_size}
        window = {"window": asdict(self._plan.start_of(step * self._batch))}
        return json.dumps({"identity": self._identity, **position, **window, "costs": self._costs}).encode()

    def restore(self, state: bytes) -> None:
        """Continues after ``state``, which any rank of any number of ranks may have saved.

        Raises UserError if it belongs to another stream, or was saved in the middle of a step and steps are now shared
        out otherwise: to other ranks, or by other costs of packs.
        """
        saved = read_position(state, self._identity)
        same_steps = (saved["batch"], saved["ranks"]) == (self._batch, self._world_size)
        if (saved["of_next_step"] and not same_steps) or saved["packs"] % self._batch:
            raise UserError(
                f"the data position after {saved['packs']} packs and {saved['of_next_step']} of the next step's was "
                f"saved with {saved['batch']} packs a step on {saved['ranks']} ranks; with {self._batch} packs a step "
                f"on {self._world_size} ranks it is in the middle of a step"
            )
        dealt_otherwise = differences(saved.get("costs", COSTS_BEFORE), self._costs)
        if dealt_otherwise and saved["of_next_step"] and self._world_size > 1:
            raise UserError(
                f"the data position is {saved['of_next_step']} packs into a step whose packs would now be shared out "
                f"otherwise: {'; '.join(dealt_otherwise)}; set both in the recipe's reading to continue"
            )
        self._packs = None
        self._plan.start_at(WindowStart(**saved["window"]))
        self._taken = saved["packs"] // self._world_size + saved["of_next_step"]

    def close(self) -> None:
        """Ends the reader processes."""
        self._packs = None
        self._plan.close()


class _Orders(Sampler[Any]):
    """What the reader processes are asked for, in order."""

    def __init__(self, orders: Iterator[PlannedPack]) -> None:
        self._orders = orders

    def __iter__(self) -> Iterator[PlannedPack]:
        return self._orders


def _as_it_is(pack: Any) -> Any:
    return pack
