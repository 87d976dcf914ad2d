"""The order of packs as a pure function: (data sets, settings, seed) and a pack's number give its samples.

Each source is an endless row of its samples, shuffled anew for every pass (``permutation.py``). A window takes the next
stretch of every row, as long as its weight asks for, packs all of it together and shuffles the packs; windows follow
one another for ever. So a pack's number is all there is to say about a position in the data: no rank, worker or buffer
is part of it. Planning a window costs what it holds, whatever its number and however large the sources are.

With one source and no larger than ``plan_window``, a window is an epoch. With several, each epoch of the blend takes
from each source what its weight (or ``repeat``) asks for, cut to whole samples so that nothing is lost in the long run.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

import numpy as np

from megatron_eagle.config.data import DataSettings
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.order.balance_ranks import joined_pack_costs
from megatron_eagle.data.order.lengths import Lengths, dataset_lengths
from megatron_eagle.data.order.packing import pack_by_settings
from megatron_eagle.data.order.permutation import ShuffledPasses
from megatron_eagle.data.order.sample_index import Ints, Names, SampleIndex
from megatron_eagle.data.order.shared_windows import SharedWindows
from megatron_eagle.data.order.source_samples import SourceSamples
from megatron_eagle.data.order.window import Window
from megatron_eagle.data.sample.tokenizer import Tokenizer, recipe_tokenizer
from megatron_eagle.data.storage.location import Location
from megatron_eagle.errors import UserError

WINDOWS_KEPT = 2
SHARED_FROM = 50_000  # samples of a window, which take a fifth of a second
ORDER_FORMAT = 2  # part of every saved position: what another number made is another order


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
class WindowStart:
    """Where a window begins in the stream: number of the window, and packs of all windows before it."""

    window: int
    packs: int


class Plan:
    """All packs there will ever be, made one window at a time.

    Raises UserError if a source is no data set, is empty, or if no sample fits into a pack.
    """

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, seed: int) -> None:
        self.settings, self.tokenizer, self._seed = settings, tokenizer, seed
        self._sources = [SourceSamples(source.path, settings, tokenizer) for source in settings.sources]
        self._passes = [
            ShuffledPasses(len(own), json.dumps([seed, number, own.identity]).encode())
            for number, own in enumerate(self._sources)
        ]
        reasons = []
        for own in self._sources:
            reasons.append(own.first_reason())
            if reasons[-1] is None:
                break
        else:
            raise UserError(f"no sample of {', '.join(s.path for s in settings.sources)} can be used: {reasons[0]}")
        self._epoch = [s.repeat * len(c) for s, c in zip(settings.sources, self._sources, strict=True) if s.repeat]
        if not self._epoch:
            total, weights = sum(map(len, self._sources)), sum(source.weight for source in settings.sources)
            self._epoch = [total * source.weight / weights for source in settings.sources]
        # Windows are equal parts of an epoch.
        parts = math.ceil(sum(self._epoch) / settings.reading.plan_window)
        self._per_window = [size / parts for size in self._epoch]
        self.start_at(WindowStart(0, 0))
        self.window = lru_cache(maxsize=WINDOWS_KEPT)(self._plan_window)
        self._shared: SharedWindows | None = None

    def share(self, stream: Any) -> None:
        """From now on each window is planned by one process of this machine, and the next one in the background.

        stream: all that the windows depend on, JSON. Windows that are planned faster than shared are not.
        """
        if sum(self._per_window) >= SHARED_FROM:
            self._shared = SharedWindows(stream, self._plan_window)
            self.window = lru_cache(maxsize=WINDOWS_KEPT)(self._shared.get)

    def close(self) -> None:
        """Removes what is shared, if nobody else uses it."""
        if self._shared is not None:
            self._shared.close()

    @property
    def identities(self) -> list[str]:
        """Of the data sets: the same for the same shards."""
        return [source.identity for source in self._sources]

    def start_at(self, start: WindowStart) -> None:
        """Begins to count packs at a window whose place in the stream is known; the packs before it are forgotten."""
        self._start = start
        self._first_packs = [start.packs]  # of the windows from there on that were planned, and of the one after

    def start_of(self, number: int) -> WindowStart:
        """The last window known to begin at this pack or before it."""
        after = int(np.searchsorted(self._first_packs, number, side="right")) - 1
        if after < 0:
            raise ValueError(f"pack {number} is before pack {self._start.packs}, where this plan was told to start")
        return WindowStart(self._start.window + after, self._first_packs[after])

    def pack(self, number: int) -> PlannedPack:
        """The pack of this number, from 0."""
        window, place = self._find(number)
        samples = tuple(self._sample(window, own) for own in window.members_of(place))
        rejected = zip(window.rejected.tolist(), range(len(window.reasons)), strict=True) if place == 0 else ()
        return PlannedPack(number, samples, tuple((window.ids[own], window.reasons[nth]) for own, nth in rejected))

    def cost(self, number: int) -> float:
        """Cost of computing this pack (``balance_ranks.pack_costs``)."""
        window, place = self._find(number)
        return float(window.costs[place])

    def first_of_epoch(self, epoch: int) -> int:
        """Number of the first pack of an epoch, from 0; packs per epoch differ a little from epoch to epoch.

        How many packs a window has is known when it is planned, so this plans all windows before that epoch.
        """
        window = epoch * round(sum(self._epoch) / sum(self._per_window)) - self._start.window
        if window < 0:
            raise ValueError(
                f"epoch {epoch} begins before window {self._start.window}, where this plan was told to start"
            )
        while len(self._first_packs) <= window:
            self._count_next()
        return self._first_packs[window]

    def _find(self, number: int) -> tuple[Window, int]:
        """The window of a pack and its place in it; windows from the start on are planned to count their packs."""
        while self._first_packs[-1] <= number:
            self._count_next()
        start = self.start_of(number)
        window, place = self.window(start.window), number - start.packs
        if self._shared is not None and 2 * place >= len(window):
            self._shared.prepare(start.window + 1)
        return window, place

    def _count_next(self) -> None:
        number = self._start.window + len(self._first_packs) - 1
        self._first_packs.append(self._first_packs[-1] + len(self.window(number)))

    def _plan_window(self, number: int) -> Window:
        numbers = [self._draw(source, number) for source in range(len(self._sources))]
        drawn = [source.draw(own) for source, own in zip(self._sources, numbers, strict=True)]
        tokens = np.concatenate([own.lengths.tokens for own in drawn])
        tiles = np.concatenate([own.lengths.tiles for own in drawn])
        good = np.flatnonzero(tokens > 0)
        packs = pack_by_settings(self.settings, tokens[good], tiles[good]).packs
        if len(tokens) and not packs:
            packs = [[]]  # of padding alone, as where all samples of a pack are broken: it says who was rejected
        sizes = np.array([len(pack) for pack in packs], dtype=np.int64)
        members = good[np.fromiter(chain.from_iterable(packs), np.int64, len(good))]
        order = _generator(self._seed, "packs", number).permutation(len(packs))
        # Packs are built longest first; a pack's own order is of no consequence but should not always be that one.
        inside = _generator(self._seed, "samples", number).permutation(len(tokens))
        members = members[np.lexsort((inside[members], np.repeat(np.argsort(order), sizes)))]
        first_member = np.concatenate([[0], np.cumsum(sizes[order])])
        s = self.settings
        if len(members):
            pack = s.pack_length, s.attention_parity, s.tile_cost
            costs = joined_pack_costs(members, first_member[:-1], tokens, tiles, *pack)
        else:
            costs = np.full(len(packs), s.pack_length + s.pack_length**2 / s.attention_parity)
        rejected = np.flatnonzero(tokens == 0)
        reasons = chain.from_iterable(
            (own.lengths.rejected[place] for place in sorted(own.lengths.rejected)) for own in drawn
        )
        return Window(
            sources=np.repeat(np.arange(len(drawn), dtype=np.int32), [len(own) for own in numbers]),
            tokens=tokens,
            tiles=tiles,
            keys=Names.joined([own.keys for own in drawn]),
            ids=Names.joined([own.ids for own in drawn]),
            members=members,
            first_member=first_member,
            costs=costs,
            rejected=rejected,
            reasons=Names.of(reasons),
        )

    def _draw(self, source: int, window: int) -> Ints:
        """Numbers of the samples that a window takes from a source."""
        per_window = self._per_window[source]
        return self._passes[source].stretch(_whole(window * per_window), _whole((window + 1) * per_window))

    def _sample(self, window: Window, place: int) -> PlannedSample:
        return PlannedSample(
            path=self._sources[window.sources[place]].path,
            key=window.keys[place],
            id=window.ids[place],
            tokens=int(window.tokens[place]),
            tiles=int(window.tiles[place]),
        )

    @property
    def sample_indexes(self) -> Sequence[SampleIndex]:
        """All that is known of the samples of each source, for reports; opened anew each time."""
        return [source.index() for source in self._sources]

    @cached_property
    def lengths(self) -> Sequence[Lengths]:
        """Lengths of all samples of each source, for reports: what a window needs it finds by itself."""
        return [dataset_lengths(index, self.tokenizer, self.settings) for index in self.sample_indexes]


def open_stage_plan(recipe: Recipe, stage: Stage) -> Plan:
    """The order of the packs that training ``stage`` reads, unless it reads by ``order=buffer``.

    stage: of the recipe, or a variant of one by the same name.
    """
    return Plan(recipe.data_settings(stage), recipe_tokenizer(recipe), recipe.data_seed(stage))


def _whole(samples: float) -> int:
    """Rounded down, except where only the float's last digits are missing."""
    return math.floor(samples + 1e-6)


def _generator(seed: int, purpose: str, number: int) -> np.random.Generator:
    """Random numbers that depend on nothing but what is named here."""
    digest = hashlib.sha256(json.dumps([seed, purpose, number]).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def epoch_lengths(plan: Plan) -> tuple[Ints, Ints]:
    """Tokens and tiles of every usable sample of the first window, an epoch unless that is larger; for reports."""
    window = plan.window(0)
    used = window.tokens > 0
    return window.tokens[used].astype(np.int64), window.tiles[used].astype(np.int64)
