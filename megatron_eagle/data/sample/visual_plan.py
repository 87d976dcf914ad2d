"""How one sample's pictures are cut: tiles of each image, frames of each video with their words, and all tokens.

Planning does this with sizes from the sample_index, reading with those of the files; the same sizes give the same plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_eagle.config.data import DataSettings
from megatron_eagle.config.reading import Tiling
from megatron_eagle.data.media.frames import (
    VideoInfo,
    frame_times,
    frame_words,
    spread_frames,
    spread_place,
    wanted_frames,
)
from megatron_eagle.data.media.tiling import Grid, choose_grid
from megatron_eagle.data.sample.budget import Allocation, BudgetRequest, allocate, capped, outcomes, tiles_under
from megatron_eagle.data.sample.chatml import ShownFrame
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.errors import BrokenSample

FRAME_TAGS = 2  # tokens around a frame's tiles, which count as text for an image
WORDS_KEPT = 200_000  # texts before a frame, whose tokens are remembered


@dataclass(frozen=True)
class Pictures:
    """What a sample has to show: (width, height) of each image, upright, and what is known of each video.

    video_numbers: as in ``Conversation``; they are part of the words before a video. image_documents, image_numbers:
    as there; pages and the words before them may be left out. Empty without documents.
    """

    sizes: tuple[tuple[int, int], ...] = ()
    videos: tuple[VideoInfo, ...] = ()
    video_numbers: tuple[int, ...] = ()
    image_documents: tuple[int, ...] = ()
    image_numbers: tuple[int, ...] = ()

    @property
    def documents(self) -> list[list[int]]:
        """The places of the pages of each document."""
        return [
            [place for place, one in enumerate(self.image_documents) if one == own]
            for own in sorted(set(self.image_documents) - {0})
        ]

    def video_number(self, place: int) -> int:
        """Number, from 0, of the video shown at ``place``, in the list it came from."""
        return self.video_numbers[place] - 1 if self.video_numbers else place


@dataclass(frozen=True)
class Clip:
    """What is shown of one video: seconds and words of each frame, the grid each is cut to, tokens of it all."""

    times: tuple[float, ...]
    words: tuple[str, ...]
    grid: Grid
    tokens: int

    @property
    def tiles(self) -> int:
        """Tiles of one frame, thumbnail included."""
        columns, rows = self.grid
        return columns * rows + (1 if columns * rows > 1 else 0)

    @property
    def frames(self) -> list[ShownFrame]:
        return [ShownFrame(words, self.tiles) for words in self.words]


@dataclass(frozen=True)
class VisualPlan:
    """How a sample's pictures are cut: the rule, the tiles of each image that follow from it, and frames of videos.

    tiles: 0 of a page that is left out. tokens: of all tiles, and of frames with their words, less those of the words
    before pages that are left out. outcomes: what had to be left out (``budget.outcomes``).
    """

    tiling: Tiling
    tiles: tuple[int, ...]
    clips: tuple[Clip, ...]
    tokens: int
    outcomes: tuple[str, ...] = ()

    @property
    def total_tiles(self) -> int:
        return sum(self.tiles) + self.total_frame_tiles

    @property
    def total_frame_tiles(self) -> int:
        return sum(clip.tiles * len(clip.times) for clip in self.clips)

    @property
    def total_frames(self) -> int:
        return sum(len(clip.times) for clip in self.clips)


class VisualPlanner:
    """Decides how samples are cut; it remembers how many tokens words before a frame have.

    With ``reading.degrade``, as much is shown as the pack leaves room for (``budget.py``).
    """

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self._words: dict[str, int] = {}

    def plan(self, pictures: Pictures, text: int) -> VisualPlan:
        """The cut for a sample with ``text`` tokens beside its pictures; raises BrokenSample if it fits no pack."""
        s = self.settings
        plan = self._whole(pictures)
        if s.reading.degrade and self._over(plan, text) > 0:
            plan = self._degraded(pictures, text)
        tokens, tiles, most_tiles = text + plan.tokens, plan.total_tiles, s.reading.max_tiles_per_pack
        if most_tiles is not None and tiles > most_tiles:
            raise BrokenSample(f"sample of {tiles} tiles, a pack holds {most_tiles}")
        if tokens > s.pack_length:
            raise BrokenSample(f"sample of {tokens} tokens ({tiles} tiles), a pack holds {s.pack_length}")
        return plan

    def _over(self, plan: VisualPlan, text: int) -> int:
        """Tokens by which a cut is too much for a pack, of its tokens or of its tiles; not above 0 if it fits."""
        s = self.settings
        most_tiles = s.reading.max_tiles_per_pack
        tiles_over = 0 if most_tiles is None else plan.total_tiles - most_tiles
        return max(text + plan.tokens - s.pack_length, tiles_over * s.tokens_per_tile)

    def _whole(self, pictures: Pictures) -> VisualPlan:
        s = self.settings
        tiles = tiles_under(s.tiling.max_tiles, pictures.sizes, s.tiling)
        frames = [wanted_frames(s.reading.video, info) for info in pictures.videos]
        return self._assemble(s.tiling, tiles, pictures, frames)

    def _assemble(
        self, tiling: Tiling, tiles: tuple[int, ...], pictures: Pictures, frames: Sequence[int]
    ) -> VisualPlan:
        clips = tuple(self._clips(pictures, frames))
        left_out = sum(self._page_words(pictures, place) for place, own in enumerate(tiles) if not own)
        tokens = sum(tiles) * self.settings.tokens_per_tile + sum(clip.tokens for clip in clips) - left_out
        return VisualPlan(tiling, tiles, clips, tokens)

    def _clips(self, pictures: Pictures, frames: Sequence[int]) -> list[Clip]:
        pairs = enumerate(zip(pictures.videos, frames, strict=True))
        return [self._clip(pictures.video_number(place), info, count) for place, (info, count) in pairs]

    def _clip(self, video: int, info: VideoInfo, frames: int) -> Clip:
        s = self.settings
        times = frame_times(s.reading.video, info, frames)
        words = frame_words(s.reading.video, video, info, times)
        clip = Clip(times, words, self._frame_grid(info), 0)
        tokens = len(times) * (clip.tiles * s.tokens_per_tile + FRAME_TAGS) + sum(map(self._count, words))
        return Clip(times, words, clip.grid, tokens)

    def _frame_grid(self, info: VideoInfo) -> Grid:
        s = self.settings
        return choose_grid(info.width, info.height, capped(s.tiling, s.reading.video.frame_tiles))

    def _page_words(self, pictures: Pictures, place: int) -> int:
        """Tokens of text that a page costs which follows another one: a new line, its number, tags around its tiles."""
        number = pictures.image_numbers[place] if pictures.image_numbers else place + 1
        return self._count(f"\n<image {number}>") + FRAME_TAGS

    def _count(self, words: str) -> int:
        known = self._words.get(words)
        if known is None:
            if len(self._words) >= WORDS_KEPT:
                self._words.clear()
            known = self._words[words] = len(self.tokenizer.encode(words))
        return known

    def _degraded(self, pictures: Pictures, text: int) -> VisualPlan:
        """Phases 1 and 2 of the budget, in which a page is an image; pages are left out if one tile each is too much.

        A frame's words are first taken to be as long as the longest of them; should others be longer, or the tiles too
        many, the budget is made smaller until all fits.
        """
        s = self.settings
        wanted = [wanted_frames(s.reading.video, info) for info in pictures.videos]
        least = [min(s.reading.video.least_frames, most) for most in wanted]
        room = s.pack_length
        clips = self._clips(pictures, wanted)
        words = [max(map(self._count, clip.words[1:] or clip.words)) for clip in clips]
        headers = sum(max(0, self._count(clip.words[0]) - own) for clip, own in zip(clips, words, strict=True))
        on_top = [
            FRAME_TAGS + own + (clip.tiles - 1) * s.tokens_per_tile for clip, own in zip(clips, words, strict=True)
        ]
        while True:
            wish = BudgetRequest(
                text_tokens=text + headers,
                image_sizes=pictures.sizes,
                frames=sum(wanted),
                least_frames=sum(least),
                frame_tokens=max(on_top, default=0),
            )
            wish, granted, shown = self._allocate(pictures, wish, room)
            tiling = capped(s.tiling, granted.tile_cap)
            of_shown = dict(zip(shown, granted.tiles, strict=True))
            tiles = tuple(of_shown.get(place, 0) for place in range(len(pictures.sizes)))
            plan = self._assemble(tiling, tiles, pictures, spread_frames(granted.frames, wanted, least))
            over = self._over(plan, text)
            if over <= 0:
                fewer = ("fewer pages",) if len(shown) < len(tiles) else ()
                return replace(plan, outcomes=(*outcomes(wish, granted, s.tiling), *fewer))
            room -= over

    def _allocate(
        self, pictures: Pictures, wish: BudgetRequest, room: int
    ) -> tuple[BudgetRequest, Allocation, Sequence[int]]:
        """The wish that is granted, and the images it shows: all, or without some pages if nothing else fits."""
        s = self.settings
        reason: BrokenSample | None = None
        for shown in self._choices(pictures, room):
            left_out = set(range(len(pictures.sizes))).difference(shown)
            own = replace(
                wish,
                text_tokens=wish.text_tokens - sum(self._page_words(pictures, place) for place in left_out),
                image_sizes=tuple(pictures.sizes[place] for place in shown),
            )
            try:
                return own, allocate(own, room, s.tiling, s.tokens_per_tile), shown
            except BrokenSample as error:
                reason = error
        assert reason is not None
        raise reason

    def _choices(self, pictures: Pictures, room: int) -> Iterator[Sequence[int]]:
        """Images to show: all; then ever fewer pages, spread over each document from its first to its last."""
        s = self.settings
        yield range(len(pictures.sizes))
        documents = pictures.documents
        wanted = [len(pages) for pages in documents]
        least = [min(s.reading.video.least_frames, count) for count in wanted]
        others = [place for place in range(len(pictures.sizes)) if not any(place in pages for pages in documents)]
        most = min(sum(wanted) - 1, room // (s.tokens_per_tile + FRAME_TAGS))
        for count in range(most, sum(least) - 1, -1):
            parts = zip(documents, spread_frames(count, wanted, least), strict=True)
            yield sorted([*others, *(own[spread_place(k, part, len(own))] for own, part in parts for k in range(part))])
