"""Draws the demo's pictures: a scene (what is to be seen, a small dataclass) becomes a PIL image of any size.

Why draw instead of download: the demo has to run on a bare machine, ship no binary file and know the true answer to
every question it asks. Only Pillow and its built-in font are used, and all chance comes from the caller's generator,
so a seed gives the same pixels everywhere the same Pillow is installed.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (220, 35, 35),
    "green": (30, 150, 50),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 30),
    "purple": (140, 40, 170),
    "orange": (245, 130, 20),
    "black": (20, 20, 20),
}
PAPER_COLOURS: tuple[Colour, ...] = ((255, 255, 255), (246, 246, 242))
MAX_COUNT = 5
LETTER_SHARE = (0.4, 0.7)
"""Font size of a word and of a number, as a share of the picture's shorter side."""


@dataclass(frozen=True)
class ShapeScene:
    """One shape in one colour."""

    shape: str
    colour: str


@dataclass(frozen=True)
class CountScene:
    """``count`` equal dots in one colour, none touching another."""

    colour: str
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_COUNT:
            raise ValueError(f"a counting scene holds 1 to {MAX_COUNT} dots, not {self.count}")


@dataclass(frozen=True)
class PrintScene:
    """A word or number printed in one colour."""

    text: str
    colour: str


@dataclass(frozen=True)
class ChartScene:
    """A bar chart: (colour, height) from left to right; heights are distinct fractions of the plot in (0, 1]."""

    bars: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        heights = [height for _, height in self.bars]
        if len(set(heights)) != len(heights) or not all(0 < height <= 1 for height in heights):
            raise ValueError(f"bar heights must be distinct and in (0, 1], got {heights}")


Scene = ShapeScene | CountScene | PrintScene | ChartScene


def draw_scene(scene: Scene, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """The picture of ``scene`` as an RGB image of ``size`` = (width, height); place, shade and paper by lot."""
    image = Image.new("RGB", size, rng.choice(PAPER_COLOURS))
    pen = ImageDraw.Draw(image)
    match scene:
        case ShapeScene(shape, colour):
            side = min(size) * rng.uniform(0.75, 0.92)
            SHAPES[shape](pen, _box_within((0, 0, *size), side, rng), _shade(colour, rng))
        case CountScene(colour, count):
            ink, share = _shade(colour, rng), rng.uniform(0.75, 0.85)
            for cell in rng.sample(_cells(size), count):
                side = min(cell[2] - cell[0], cell[3] - cell[1]) * share
                SHAPES["circle"](pen, _box_within(cell, side, rng), ink)
        case PrintScene(text, colour):
            _print(pen, text, size, _shade(colour, rng), rng)
        case ChartScene(bars):
            _chart(pen, bars, size, rng)
    return image


def _shade(name: str, rng: random.Random) -> Colour:
    """The named colour, a little lighter or darker; far less than the distance to the next colour."""
    red, green, blue = (min(255, max(0, value + rng.randint(-12, 12))) for value in COLOURS[name])
    return red, green, blue


def _box_within(area: Box, side: float, rng: random.Random) -> Box:
    """A square of ``side`` pixels somewhere inside ``area``."""
    left = rng.uniform(area[0], area[2] - side - 1)
    top = rng.uniform(area[1], area[3] - side - 1)
    return left, top, left + side, top + side


def _cells(size: tuple[int, int]) -> list[Box]:
    """At least MAX_COUNT equal cells, as square as the picture allows, so that dots never touch."""
    width, height = size
    best = max(
        ((columns, rows) for columns in range(1, MAX_COUNT + 1) for rows in range(1, MAX_COUNT + 1)
         if MAX_COUNT <= columns * rows <= MAX_COUNT + 3),
        key=lambda grid: min(width / grid[0], height / grid[1]),
    )  # fmt: skip
    columns, rows = best
    cell_width, cell_height = width / columns, height / rows
    return [
        (column * cell_width, row * cell_height, (column + 1) * cell_width, (row + 1) * cell_height)
        for row in range(rows)
        for column in range(columns)
    ]


@lru_cache(maxsize=256)
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels)


def _print(pen: ImageDraw.ImageDraw, text: str, size: tuple[int, int], ink: Colour, rng: random.Random) -> None:
    """Print ``text`` near the middle, its letters a fixed share of the picture (smaller if it would not fit)."""
    width, height = size
    probe = _font(100).getbbox(text)
    fit = min(0.94 * width / (probe[2] - probe[0]), LETTER_SHARE[text.isdigit()] * min(width, height) / 100)
    pixels = max(8, int(100 * fit * rng.uniform(0.95, 1.0)))
    font = _font(pixels)
    left, top, right, bottom = font.getbbox(text)
    x = (width - (right - left)) * rng.uniform(0.4, 0.6) - left
    y = (height - (bottom - top)) * rng.uniform(0.4, 0.6) - top
    # A stroke of at least one pixel keeps the thin built-in face readable after shrinking to a tile.
    pen.text((x, y), text, fill=ink, font=font, stroke_width=max(1, pixels // 30), stroke_fill=ink)


def _chart(
    pen: ImageDraw.ImageDraw, bars: tuple[tuple[str, float], ...], size: tuple[int, int], rng: random.Random
) -> None:
    """Bars on a grey base line, all equally wide."""
    width, height = size
    base, top = height * 0.94, height * 0.06
    pitch = width * 0.94 / len(bars)
    bar_width = pitch * rng.uniform(0.6, 0.8)
    for index, (colour, share) in enumerate(bars):
        left = width * 0.03 + index * pitch + (pitch - bar_width) / 2
        pen.rectangle((left, base - (base - top) * share, left + bar_width, base), fill=_shade(colour, rng))
    pen.line((0, base, width, base), fill=(110, 110, 110), width=max(1, height // 60))


def _polygon(corners: Callable[[], list[tuple[float, float]]]) -> Callable[[ImageDraw.ImageDraw, Box, Colour], None]:
    """A drawing function for a polygon given in unit coordinates (0..1 from the box's top left)."""
    unit = corners()

    def draw(pen: ImageDraw.ImageDraw, box: Box, ink: Colour) -> None:
        left, top, right, bottom = box
        pen.polygon([(left + x * (right - left), top + y * (bottom - top)) for x, y in unit], fill=ink)

    return draw


def _star() -> list[tuple[float, float]]:
    points = []
    for index in range(10):
        radius = 0.5 if index % 2 == 0 else 0.21
        angle = math.pi * index / 5 - math.pi / 2
        points.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return points


def _cross() -> list[tuple[float, float]]:
    a, b = 0.33, 0.67
    return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]


def _circle(pen: ImageDraw.ImageDraw, box: Box, ink: Colour) -> None:
    pen.ellipse(box, fill=ink)


def _ring(pen: ImageDraw.ImageDraw, box: Box, ink: Colour) -> None:
    pen.ellipse(box, outline=ink, width=max(2, round((box[2] - box[0]) * 0.2)))


SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, Box, Colour], None]] = {
    "circle": _circle,
    "ring": _ring,
    "square": _polygon(lambda: [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]),
    "triangle": _polygon(lambda: [(0.5, 0), (1, 1), (0, 1)]),
    "star": _polygon(_star),
    "cross": _polygon(_cross),
}
