"""One sample as the model sees it: what is read and what is learned, with its pictures where they stand in the text."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from megatron_eagle.config.data import DataSettings
from megatron_eagle.data.media.tiling import Grid, choose_grid
from megatron_eagle.data.order.scan import read_pictures
from megatron_eagle.data.sample.assemble import Segment
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlan
from megatron_eagle.data.storage.shards import StoredSample

SHOWN_SIDE = 112  # pixels of a tile on the page
GAP = 4
PICTURES_SHOWN = 24  # of a sample; a video has hundreds of frames


@dataclass(frozen=True)
class Picture:
    """An image or a frame: its grid of tiles, in words, and the tiles laid out so, as base64 of a WebP.

    webp is empty beyond the first ``PICTURES_SHOWN`` of a sample.
    """

    name: str
    grid: str
    tiles: int
    webp: str


@dataclass(frozen=True)
class Piece:
    """A stretch of the text: words, or the picture that stands there."""

    text: str
    picture: Picture | None = None


@dataclass(frozen=True)
class Block:
    """Pieces that are all read, or all learned."""

    learned: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ShownSample:
    """kind: what it shows, for the filter: images, videos, text."""

    id: str
    source: str
    kind: str
    tokens: int
    learned: int
    blocks: tuple[Block, ...]
    pictures: tuple[Picture, ...]


def show_sample(
    source: str, segment: Segment, plan: VisualPlan, stored: StoredSample, settings: DataSettings, tokenizer: Tokenizer
) -> ShownSample:
    """What the page says of one sample; text is decoded from the very tokens that are trained on."""
    pictures = tuple(_pictures(segment.tiles, plan, stored, settings))
    kinds = {kind for kind, _ in stored.conversation.media}
    return ShownSample(
        id=segment.sample_id,
        source=source,
        kind="videos" if "video" in kinds else "images" if kinds else "text",
        tokens=len(segment.tokens),
        learned=int((segment.labels != IGNORE_LABEL).sum()),
        blocks=tuple(_blocks(segment, pictures, settings.tokens_per_tile, tokenizer)),
        pictures=pictures,
    )


def _pictures(tiles: Tensor, plan: VisualPlan, stored: StoredSample, settings: DataSettings) -> Iterator[Picture]:
    """The images and frames of a sample in the order in which they stand in it."""
    sizes = read_pictures(stored, settings.reading.max_pixels).sizes
    named: list[tuple[str, int, Grid]] = []
    for kind, number in stored.conversation.media:
        if kind == "image" and plan.tiles[number]:
            named.append((f"image {number + 1}", plan.tiles[number], choose_grid(*sizes[number], plan.tiling)))
        elif kind == "video":
            clip = plan.clips[number]
            named += [(f"video {number + 1} at {time:.1f} s", clip.tiles, clip.grid) for time in clip.times]
    start = 0
    for place, (name, count, (columns, rows)) in enumerate(named):
        words = f"{columns} x {rows}" + (" and a thumbnail" if count > columns * rows else "")
        webp = _sheet(tiles[start : start + count], columns, rows) if place < PICTURES_SHOWN else ""
        yield Picture(name, words, count, webp)
        start += count


def _blocks(
    segment: Segment, pictures: Sequence[Picture], tokens_per_tile: int, tokenizer: Tokenizer
) -> Iterator[Block]:
    """Stretches that are read and stretches that are learned, one after the other."""
    learned = (segment.labels != IGNORE_LABEL).tolist()
    slots, shown = segment.tile_slots.tolist(), 0
    pictures_at = {}
    for picture in pictures:
        pictures_at[slots[shown]] = picture
        shown += picture.tiles
    pieces: list[Piece] = []
    start = place = 0
    while place < len(learned):
        if place in pictures_at:
            picture = pictures_at[place]
            pieces += [*_words(segment.tokens[start:place], tokenizer), Piece("", picture)]
            start = place = place + picture.tiles * tokens_per_tile
        else:
            place += 1
        ends = place == len(learned)
        if ends or (place and learned[place] != learned[place - 1]):
            pieces += _words(segment.tokens[start:place], tokenizer)
            if any(piece.picture or piece.text.strip() for piece in pieces):  # not the line's end behind an answer
                yield Block(learned[place - 1], tuple(pieces))
            pieces, start = [], place


def _words(tokens: Tensor, tokenizer: Tokenizer) -> list[Piece]:
    text = tokenizer.decode(tokens.tolist()) if len(tokens) else ""
    return [Piece(text)] if text else []


def _sheet(tiles: Tensor, columns: int, rows: int) -> str:
    """Tiles in their grid with gaps, and the thumbnail, if there is one, to the right of them."""
    side, pitch = SHOWN_SIDE, SHOWN_SIDE + GAP
    thumbnail = len(tiles) - rows * columns
    width = (columns + thumbnail) * pitch + 2 * GAP * thumbnail - GAP
    sheet = Image.new("RGBA", (width, rows * pitch - GAP))  # gaps let the page through
    for number, tile in enumerate(tiles):
        small = Image.fromarray(tile.permute(1, 2, 0).numpy()).resize((side, side))
        row, column = divmod(number, columns)
        last = number == rows * columns
        left = columns * pitch + 2 * GAP if last else column * pitch
        sheet.paste(small, (left, 0 if last else row * pitch))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=88)
    return base64.b64encode(buffer.getvalue()).decode()
