"""The order of packs as a pure function: (data sets, settings, seed) and a pack's number give its samples.

Each source is an endless row of its samples, shuffled anew for every pass. A window takes the next stretch of every
row, as long as its weight asks for, packs all of it together and shuffles the packs; windows follow one another for
ever. So a pack's number is all there is to say about a position in the data: no rank, worker or buffer is part of it.

With one source and no larger than ``plan_window``, a window is an epoch. With several, each epoch of the blend takes
from each source what its weight (or ``repeat``) asks for, cut to whole samples so that nothing is lost in the long run.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_eagle.config.data import DataSettings
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.order.balance_ranks import pack_costs
from megatron_eagle.data.order.lengths import Lengths, dataset_lengths
from megatron_eagle.data.order.packing import pack_by_settings
from megatron_eagle.data.order.sample_index import Ints, SampleIndex, open_sample_index
from megatron_eagle.data.sample.tokenizer import Tokenizer, recipe_tokenizer
from megatron_eagle.data.storage.location import Location
from megatron_eagle.errors import UserError

WINDOWS_KEPT = 2


@dataclass(frozen=True)
class PlannedSample:
    """One sample of a pack: where it lies and what it is expected to cost."""

    path: Location
    key: str
    id: str
    tokens: int
    tiles: int


@dataclass(frozen=True)
class PlannedPack:
    """number: of the pack in the whole stream; rejected: (id, reason) of samples that fit into no pack at all."""

    number: int
    samples: tuple[PlannedSample, ...]
    rejected: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Window:
    """sources, samples: int [n], what the window holds; packs: indices into them, in order; rejected: indices too.

    costs: of each pack (``balance_ranks.pack_costs``).
    """

    sources: Ints
    samples: Ints
    packs: list[list[int]]
    rejected: Ints
    costs: NDArray[np.float64]


class Plan:
    """All packs there will ever be, made one window at a time.

    Raises UserError if a source is no data set, is empty, or if no sample fits into a pack.
    """

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, seed: int) -> None:
        self.settings, self.tokenizer, self._seed = settings, tokenizer, seed
        self._sample_indexes = [open_sample_index(source.path) for source in settings.sources]
        for sample_index in self._sample_indexes:
            if not len(sample_index):
                raise UserError(f"{sample_index.path}: the data set holds no samples")
        self._lengths = [dataset_lengths(sample_index, tokenizer, settings) for sample_index in self._sample_indexes]
        if all(len(own.rejected) == len(own.tokens) for own in self._lengths):
            first = next(iter(self._lengths[0].rejected.values()))
            raise UserError(f"no sample of {', '.join(s.path for s in settings.sources)} can be used: {first}")
        self._epoch = [
            s.repeat * len(c) for s, c in zip(settings.sources, self._sample_indexes, strict=True) if s.repeat
        ]
        if not self._epoch:
            total = sum(map(len, self._sample_indexes))
            self._epoch = [total * s.weight / sum(x.weight for x in settings.sources) for s in settings.sources]
        # Windows are equal parts of an epoch.
        parts = math.ceil(sum(self._epoch) / settings.reading.plan_window)
        self._per_window = [size / parts for size in self._epoch]
        self._first_packs = [0]  # of the windows that were planned so far, and of the one after
        self.window = lru_cache(maxsize=WINDOWS_KEPT)(self._plan_window)

    def pack(self, number: int) -> PlannedPack:
        """The pack of this number, from 0."""
        window, place = self._find(number)
        planned = self.window(window)
        samples = [self._sample(planned, i) for i in planned.packs[place]]
        rejected = [self._rejection(planned, i) for i in planned.rejected] if place == 0 else []
        return PlannedPack(number, tuple(samples), tuple(rejected))

    def cost(self, number: int) -> float:
        """Cost of computing this pack (``balance_ranks.pack_costs``)."""
        window, place = self._find(number)
        return float(self.window(window).costs[place])

    def first_of_epoch(self, epoch: int) -> int:
        """Number of the first pack of an epoch, from 0; packs per epoch differ a little from epoch to epoch."""
        window = epoch * round(sum(self._epoch) / sum(self._per_window))
        while len(self._first_packs) <= window:
            self._count_next()
        return self._first_packs[window]

    def _find(self, number: int) -> tuple[int, int]:
        """(window, place in it) of a pack; all windows before it are planned once, to count their packs."""
        while self._first_packs[-1] <= number:
            self._count_next()
        window = int(np.searchsorted(self._first_packs, number, side="right")) - 1
        return window, number - self._first_packs[window]

    def _count_next(self) -> None:
        number = len(self._first_packs) - 1
        self._first_packs.append(self._first_packs[-1] + len(self.window(number).packs))

    def _plan_window(self, number: int) -> Window:
        drawn = [self._draw(source, number) for source in range(len(self._sample_indexes))]
        sources = np.concatenate([np.full(len(own), source) for source, own in enumerate(drawn)])
        samples = np.concatenate(drawn)
        tokens = _pick([lengths.tokens for lengths in self._lengths], drawn)
        tiles = _pick([lengths.tiles for lengths in self._lengths], drawn)
        good = np.flatnonzero(tokens > 0)
        packs = pack_by_settings(self.settings, tokens[good], tiles[good]).packs
        order = _generator(self._seed, "packs", number).permutation(len(packs))
        # Packs are built longest first; a pack's own order is of no consequence but should not always be that one.
        inside = _generator(self._seed, "samples", number).permutation(len(samples))
        chosen = [sorted(good[packs[i]].tolist(), key=inside.__getitem__) for i in order]
        s = self.settings
        costs = pack_costs(chosen, tokens, tiles, s.pack_length, s.attention_parity, s.tile_cost)
        return Window(sources, samples, chosen, np.flatnonzero(tokens == 0), costs)

    def _draw(self, source: int, window: int) -> Ints:
        """Numbers of the samples that a window takes from a source, passes over the data set one after another."""
        per_window, size = self._per_window[source], len(self._sample_indexes[source])
        begin, end = _whole(window * per_window), _whole((window + 1) * per_window)
        taken = [self._pass(source, p) for p in range(begin // size, -(-end // size))]
        start = begin - begin // size * size
        return np.concatenate(taken)[start : start + end - begin] if taken else np.zeros(0, np.int64)

    def _pass(self, source: int, number: int) -> Ints:
        sample_index = self._sample_indexes[source]
        return _generator(self._seed, f"{source} {sample_index.identity}", number).permutation(len(sample_index))

    def _sample(self, window: Window, place: int) -> PlannedSample:
        source, sample = int(window.sources[place]), int(window.samples[place])
        sample_index, lengths = self._sample_indexes[source], self._lengths[source]
        return PlannedSample(
            path=sample_index.path,
            key=sample_index.keys[sample],
            id=sample_index.ids[sample],
            tokens=int(lengths.tokens[sample]),
            tiles=int(lengths.tiles[sample]),
        )

    def _rejection(self, window: Window, place: int) -> tuple[str, str]:
        source, sample = int(window.sources[place]), int(window.samples[place])
        return self._sample_indexes[source].ids[sample], self._lengths[source].rejected[sample]

    @property
    def sample_indexes(self) -> Sequence[SampleIndex]:
        return self._sample_indexes

    @property
    def lengths(self) -> Sequence[Lengths]:
        return self._lengths


def open_stage_plan(recipe: Recipe, stage: Stage) -> Plan:
    """The order of the packs that training ``stage`` reads, unless it reads by ``order=buffer``.

    stage: of the recipe, or a variant of one by the same name.
    """
    return Plan(recipe.data_settings(stage), recipe_tokenizer(recipe), recipe.data_seed(stage))


def _whole(samples: float) -> int:
    """Rounded down, except where only the float's last digits are missing."""
    return math.floor(samples + 1e-6)


def _pick(arrays: Sequence[Ints], drawn: Sequence[Ints]) -> Ints:
    return np.concatenate([array[own] for array, own in zip(arrays, drawn, strict=True)])


def _generator(seed: int, purpose: str, number: int) -> np.random.Generator:
    """Random numbers that depend on nothing but what is named here."""
    digest = hashlib.sha256(json.dumps([seed, purpose, number]).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def epoch_lengths(plan: Plan) -> tuple[Ints, Ints]:
    """Tokens and tiles of every usable sample of the first window, an epoch unless that is larger; for reports."""
    window = plan.window(0)
    where = list(zip(window.sources.tolist(), window.samples.tolist(), strict=True))
    tokens = np.array([plan.lengths[source].tokens[sample] for source, sample in where], dtype=np.int64)
    tiles = np.array([plan.lengths[source].tiles[sample] for source, sample in where], dtype=np.int64)
    return tokens[tokens > 0], tiles[tokens > 0]
