"""Pictures of one's own, as a reader of the pages has them: drawn, with questions, in a folder ``mine``."""

import itertools
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (210, 40, 40), "green": (40, 150, 60), "blue": (50, 70, 200), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square", "bar", "ring", "cross")


def draw_own_pictures(folder: Path, count: int, *, held_out: int = 0, seed: int = 1) -> None:
    """Writes 0001.jpg and so on and ``samples.jsonl``; the last ``held_out`` questions go to ``held-out.jsonl``."""
    folder.mkdir(parents=True)
    rng, records = random.Random(seed), []
    things = itertools.cycle(itertools.product(COLOURS, SHAPES))
    for number, (colour, shape) in zip(range(1, count + 1), things, strict=False):
        name = f"{number:04d}.jpg"
        _draw(colour, shape, rng).save(folder / name, quality=90)
        question, answer = "<image>\nWhat is in the picture?", f"a {colour} {shape}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        turns += [{"from": "human", "value": "Which colour is it?"}, {"from": "gpt", "value": colour}]
        turns += [{"from": "human", "value": "Is it a drawing?"}, {"from": "gpt", "value": "yes"}]
        records.append(json.dumps({"id": f"{number:04d}", "image": name, "conversations": turns}) + "\n")
    (folder / "samples.jsonl").write_text("".join(records[: count - held_out]))
    if held_out:
        (folder / "held-out.jsonl").write_text("".join(records[count - held_out :]))


def _draw(colour: str, shape: str, rng: random.Random) -> Image.Image:
    """A thing of 40 to 60 pixels on a grey of its own, on a picture of 160 x 120."""
    grey = rng.randint(140, 250)
    picture = Image.new("RGB", (160, 120), (grey, grey, rng.randint(140, 250)))
    draw, fill = ImageDraw.Draw(picture), COLOURS[colour]
    size, left, top = rng.randint(40, 60), rng.randint(5, 95), rng.randint(5, 55)
    box, middle = (left, top, left + size, top + size), size // 3
    if shape == "circle":
        draw.ellipse(box, fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=8)
    elif shape == "square":
        draw.rectangle(box, fill)
    elif shape == "bar":
        draw.rectangle((left, top + middle, left + size, top + 2 * middle), fill)
    else:
        draw.rectangle((left, top + middle, left + size, top + 2 * middle), fill)
        draw.rectangle((left + middle, top, left + 2 * middle, top + size), fill)
    return picture
