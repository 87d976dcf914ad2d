"""The embedded data set: pictures and questions about them, generated from a seed, in the LLaVA form.

``generate`` writes ``samples.jsonl`` (one ``{"id", "image", "conversations", "task"}`` a line; ``image`` is a path
relative to the file, a list of two, or absent) and the pictures beside it. Seven tasks: read a word, read a number,
name a shape and its colour, count, read a bar chart, compare two images, and text only.

Sizes run from 60 x 60 to 1600 x 500 pixels and are chosen by the grid that Eagle 2's rule gives them at tiles of 64
pixels: most pictures are one tile, because every tile costs encoder time, but all grids up to twelve tiles occur.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

from megatron_eagle.demo.drawing import (
    COLOURS,
    MAX_COUNT,
    SHAPES,
    ChartScene,
    CountScene,
    PrintScene,
    Scene,
    ShapeScene,
    draw_scene,
)
from megatron_eagle.demo.questions import WORDS, Turn, comparison_turns, scene_turns, text_turns

Split = Literal["train", "heldout"]
Quality = Literal["broad", "fine"]
Grid = tuple[int, int]
T = TypeVar("T")

NUMBERS = (10, 49)

TASKS = ("word", "number", "shape", "count", "chart", "compare", "text")
TASK_SHARES: dict[Quality, dict[str, float]] = {
    "broad": {"word": 4, "number": 4, "shape": 3, "count": 3, "chart": 3, "compare": 3, "text": 3},
    "fine": {"word": 4, "number": 4, "shape": 1, "count": 3, "chart": 4, "compare": 3, "text": 2},
}
"""How often a task is drawn. Broad: everything (Eagle 2's stage 1.5); fine: more of the hard tasks (stage 2)."""
SIDE_SHARES: dict[Quality, float] = {"broad": 0.5, "fine": 0.25}
"""How often a side question is asked in training; the held-out split always asks them all."""

COMMON_GRIDS: dict[str, dict[Grid, float]] = {
    "word": {(1, 1): 8, (2, 1): 2},
    "number": {(1, 1): 8, (2, 1): 2},
    "shape": {(1, 1): 9, (2, 1): 1},
    "count": {(1, 1): 9, (2, 1): 1},
    "chart": {(1, 1): 9, (2, 1): 1},
    "compare": {(1, 1): 1},
}
RARE_GRIDS: tuple[Grid, ...] = (
    (1, 2), (3, 1), (2, 2), (4, 1), (1, 4), (5, 1), (3, 2), (2, 3), (7, 1), (4, 2), (3, 3), (5, 2), (11, 1), (6, 2),
    (4, 3),
)  # fmt: skip
RARE_SHARE = 0.05
LARGE_SIZES: tuple[tuple[int, int], ...] = ((1600, 500), (1600, 400), (1280, 500), (900, 450), (500, 500))
LARGE_SHARE = 0.005


@dataclass(frozen=True)
class _Sample:
    task: str
    images: tuple[Image.Image, ...]
    turns: Sequence[Turn]


def generate(out_dir: Path, *, split: Split, samples: int, seed: int, quality: Quality = "broad") -> Path:
    """Write ``samples`` records and their pictures into ``out_dir``; return the path of its ``samples.jsonl``.

    The same arguments give the same bytes. ``split`` decides the wordings and is part of the seed, so that no
    held-out picture is drawn from the same random numbers as a training picture. The held-out split asks every
    question of every task in equal shares; ``quality`` is not used there.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "images").mkdir(exist_ok=True)
    name = quality if split == "train" else split
    rng = random.Random(f"{name}/{seed}")
    shares = TASK_SHARES[quality] if split == "train" else dict.fromkeys(TASKS, 1.0)
    side_share = SIDE_SHARES[quality] if split == "train" else 1.0
    path = out_dir / "samples.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(samples):
            task = _draw(shares, rng) if split == "train" else TASKS[index % len(TASKS)]
            sample = _sample(task, split, side_share, rng)
            file.write(json.dumps(_record(sample, f"{name}-{index:05d}", out_dir)) + "\n")
    return path


def _draw(shares: Mapping[T, float], rng: random.Random) -> T:
    return rng.choices(list(shares), list(shares.values()))[0]


def size_for_grid(grid: Grid, rng: random.Random) -> tuple[int, int]:
    """A picture size, at least 60 x 60, to which Eagle 2's rule gives ``grid`` (columns, rows) at tiles of 64 pixels.

    The rule takes the grid with the nearest aspect ratio; of two equal ones, the larger only if the picture has more
    than half of its area. Side lengths of 60 to 66 pixels a tile satisfy both for every grid of up to 12 tiles.
    """
    columns, rows = grid
    if columns * rows == 1:
        # Up to 7 : 6 the nearest aspect ratio is 1 : 1 (the next are 4 : 3 and 3 : 4), up to 90 x 90 its smallest grid.
        side = rng.randint(60, 80)
        return side + rng.randint(0, 8), side + rng.randint(0, 8)
    unit = rng.randint(60, 66)
    return columns * unit, rows * unit


def _size(task: str, rng: random.Random) -> tuple[int, int]:
    chance = rng.random()
    if chance < LARGE_SHARE:
        return rng.choice(LARGE_SIZES)
    if chance < LARGE_SHARE + RARE_SHARE:
        return size_for_grid(rng.choice(RARE_GRIDS), rng)
    return size_for_grid(_draw(COMMON_GRIDS[task], rng), rng)


def _scene(task: str, rng: random.Random) -> Scene:
    """What is to be seen; every answer is equally likely."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(list(SHAPES))
    match task:
        case "word":
            return PrintScene(rng.choice(WORDS), colour)
        case "number":
            return PrintScene(str(rng.randint(*NUMBERS)), colour)
        case "count":
            return CountScene(colour, rng.randint(1, MAX_COUNT))
        case "chart":
            colours = rng.sample(list(COLOURS), rng.randint(2, 5))
            heights = [*rng.sample(range(1, 6), len(colours) - 1), rng.choice((7, 8))]
            shares = [height / 8 for height in rng.sample(heights, len(heights))]
            return ChartScene(tuple(zip(colours, shares, strict=True)))
        case _:
            return ShapeScene(shape, colour)


def _pair(rng: random.Random) -> tuple[ShapeScene, ShapeScene]:
    """Two shapes; colour and shape agree half the time each, so that "yes" and "no" are equally likely."""
    shapes, colours = rng.sample(list(SHAPES), 2), rng.sample(list(COLOURS), 2)
    first = ShapeScene(shapes[0], colours[0])
    return first, ShapeScene(shapes[rng.randrange(2)], colours[rng.randrange(2)])


def _sample(task: str, split: Split, side_share: float, rng: random.Random) -> _Sample:
    if task == "text":
        return _Sample(task, (), text_turns(split, rng))
    if task == "compare":
        pair = _pair(rng)
        images = tuple(draw_scene(scene, _size(task, rng), rng) for scene in pair)
        return _Sample(task, images, comparison_turns(*pair, split, rng))
    scene = _scene(task, rng)
    return _Sample(task, (draw_scene(scene, _size(task, rng), rng),), scene_turns(scene, task, split, side_share, rng))


def _record(sample: _Sample, name: str, out_dir: Path) -> dict[str, object]:
    """Save the pictures and return the LLaVA record; pictures come first, one ``<image>`` line each."""
    paths = []
    for number, image in enumerate(sample.images):
        path = f"images/{name}-{number}.png"
        image.save(out_dir / path)
        paths.append(path)
    conversations = []
    for number, (question, answer) in enumerate(sample.turns):
        markers = "<image>\n" * len(paths) if number == 0 else ""
        conversations.append({"from": "human", "value": markers + question})
        conversations.append({"from": "gpt", "value": answer})
    record: dict[str, object] = {"id": name, "task": sample.task, "conversations": conversations}
    if paths:
        record["image"] = paths[0] if len(paths) == 1 else paths
    return record
