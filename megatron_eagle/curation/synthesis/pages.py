"""Pages of text for OCR: lines, paragraphs, columns, receipts, forms and signs, and what can be read on them."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megatron_eagle.curation.synthesis.words import FIELDS, GOODS, TOTAL, number, phrase, price

PAPERS = ((255, 255, 255), (250, 246, 235), (238, 240, 245), (255, 252, 220))
INKS = ((0, 0, 0), (30, 30, 60), (70, 20, 20), (20, 60, 30))
SIGN_COLOURS = ((20, 90, 50), (140, 20, 20), (20, 50, 120), (240, 200, 40))


@dataclass(frozen=True)
class Page:
    """image: RGB. text: all of it in reading order. asked: questions with answers beyond reading all."""

    image: Image.Image
    layout: str
    text: str
    asked: list[tuple[str, str]] = field(default_factory=list)


def draw_page(layout: str, script: str, font: Path, choose: random.Random) -> Page:
    """A page of this layout, in this script, written in this font."""
    return LAYOUTS[layout](script, font, choose)


def _font(file: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


def _line(script: str, font: Path, choose: random.Random) -> Page:
    return _written("line", [[phrase(script, choose.randint(2, 6), choose)]], font, choose)


def _paragraph(script: str, font: Path, choose: random.Random) -> Page:
    return _written("paragraph", [_lines(script, choose, choose.randint(3, 9), 6)], font, choose)


def _columns(script: str, font: Path, choose: random.Random) -> Page:
    return _written("columns", [_lines(script, choose, choose.randint(3, 7), 3) for _ in range(2)], font, choose)


def _form(script: str, font: Path, choose: random.Random) -> Page:
    names = choose.sample(FIELDS, choose.randint(3, 6))
    values = [number(choose) if choose.random() < 0.5 else phrase(script, 2, choose) for _ in names]
    lines = [f"{name}: {value}" for name, value in zip(names, values, strict=True)]
    page = _written("form", [lines], font, choose)
    asked = choose.randrange(len(names))
    return Page(page.image, "form", page.text, [(f"What stands under '{names[asked]}'?", values[asked])])


def _receipt(script: str, font: Path, choose: random.Random) -> Page:
    """Names on the left, prices on the right, their sum below; in Latin, whatever the script of its title."""
    goods = choose.sample(GOODS, choose.randint(3, 7))
    prices = [price(choose) for _ in goods]
    cents = sum(int(one.replace(".", "")) for one in prices)
    total = f"{cents // 100}.{cents % 100:02}"
    rows = [*zip(goods, prices, strict=True), (TOTAL, total)]
    size = choose.randint(18, 30)
    face, title = _font(font, size), phrase(script, 2, choose)
    width = round(max(size * 14, face.getlength(title) + 2 * size))
    image = Image.new("RGB", (width, round(size * 1.6 * (len(rows) + 3))), choose.choice(PAPERS))
    draw, ink = ImageDraw.Draw(image), choose.choice(INKS)
    draw.text((size, size), title, ink, face)
    for place, (name, cost) in enumerate(rows, 2):
        draw.text((size, round(size * 1.6 * place)), name, ink, face)
        draw.text((width - size, round(size * 1.6 * place)), cost, ink, face, anchor="ra")
    text = "\n".join([title, *(f"{name} {cost}" for name, cost in rows)])
    good = choose.randrange(len(goods))
    asked = [("What is the total?", total), (f"What does {goods[good]} cost?", prices[good])]
    return Page(image, "receipt", text, asked)


def _sign(script: str, font: Path, choose: random.Random) -> Page:
    words = phrase(script, choose.randint(1, 3), choose)
    face = _font(font, choose.randint(40, 80))
    left, top, right, bottom = face.getbbox(words)
    board = Image.new("RGB", (round(right - left) + 60, round(bottom - top) + 50), choose.choice(SIGN_COLOURS))
    ImageDraw.Draw(board).text((30 - left, 25 - top), words, (255, 255, 255), face)
    turned = board.rotate(choose.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True, fillcolor=(150, 170, 190))
    return Page(turned, "sign", words)


def _lines(script: str, choose: random.Random, many: int, words: int) -> list[str]:
    return [phrase(script, choose.randint(max(1, words - 2), words), choose) for _ in range(many)]


def _written(layout: str, columns: list[list[str]], font: Path, choose: random.Random) -> Page:
    """Columns of lines, one beside the other."""
    size = choose.randint(18, 36)
    face, step = _font(font, size), round(size * choose.uniform(1.3, 1.7))
    widths = [round(max(face.getlength(line) for line in lines)) for lines in columns]
    height = step * max(map(len, columns)) + 2 * size
    image = Image.new("RGB", (sum(widths) + size * (2 * len(columns)), height), choose.choice(PAPERS))
    draw, ink, left = ImageDraw.Draw(image), choose.choice(INKS), size
    for lines, width in zip(columns, widths, strict=True):
        for place, line in enumerate(lines):
            draw.text((left, size + step * place), line, ink, face)
        left += width + 2 * size
    return Page(image, layout, "\n".join(line for lines in columns for line in lines))


LAYOUTS: dict[str, Callable[[str, Path, random.Random], Page]] = {
    "line": _line, "paragraph": _paragraph, "columns": _columns, "form": _form, "receipt": _receipt, "sign": _sign,
}  # fmt: skip
