"""A picture of what the model saw: each picture's tiles in their grid, numbered in their order, with the thumbnail."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_eagle.serving.conversation import Shown

GAP, CAPTION = 6, 18  # pixels
LARGEST_SIDE = 160  # of a tile in the picture; larger ones are made smaller
MOST_PICTURES = 64  # frames of a long video are thousands


def draw_tiles(shown: Sequence[Shown]) -> Image.Image:
    """One row for each picture or frame; above it its name, its size and its grid.

    Of more than ``MOST_PICTURES`` the first are drawn, and the last line says how many are not.
    """
    font = ImageFont.load_default(size=12)
    rows = [_draw_row(one, font) for one in shown[:MOST_PICTURES]]
    if len(shown) > MOST_PICTURES:
        rows.append(_line(f"and {len(shown) - MOST_PICTURES} more", font))
    if not rows:
        rows.append(_line("no pictures", font))
    width = max(row.width for row in rows)
    canvas = Image.new("RGB", (width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height
    return canvas


def caption(one: Shown) -> str:
    """For example ``a.png: 800 x 600 pixels, 4 x 3 tiles and a thumbnail``."""
    columns, rows = one.grid
    extra = " and a thumbnail" if len(one.tiles) > columns * rows else ""
    what = "1 tile" if columns * rows == 1 else f"{columns} x {rows} tiles"
    return f"{one.name}: {one.size[0]} x {one.size[1]} pixels, {what}{extra}"


def _line(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> Image.Image:
    width = round(font.getlength(text)) + 2 * GAP
    line = Image.new("RGB", (width, CAPTION), "white")
    ImageDraw.Draw(line).text((GAP, 2), text, fill="black", font=font)
    return line


def _draw_row(one: Shown, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> Image.Image:
    columns, rows = one.grid
    title = _line(caption(one), font)
    side = min(LARGEST_SIDE, one.tiles.shape[-1])
    across = columns + (1 if len(one.tiles) > columns * rows else 0)
    gap_before_thumbnail = 2 * GAP if across > columns else 0
    width = max(title.width, GAP + across * (side + GAP) + gap_before_thumbnail)
    row = Image.new("RGB", (width, CAPTION + rows * (side + GAP) + GAP), "white")
    row.paste(title, (0, 0))
    draw = ImageDraw.Draw(row)
    for number, tile in enumerate(one.tiles):
        column, line = (number % columns, number // columns) if number < columns * rows else (columns, 0)
        left = GAP + column * (side + GAP) + (gap_before_thumbnail if column == columns else 0)
        top = CAPTION + line * (side + GAP)
        pixels = np.ascontiguousarray(np.asarray(tile).transpose(1, 2, 0))
        row.paste(Image.fromarray(pixels).resize((side, side)), (left, top))
        label = str(number + 1)
        draw.rectangle((left, top, left + 5 + font.getlength(label), top + 15), fill="white")
        draw.text((left + 2, top + 1), label, fill="black", font=font)
    return row
