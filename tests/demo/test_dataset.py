"""The embedded data set: same bytes from the same seed, every grid, and answers that the pixels themselves confirm."""

import functools
import hashlib
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from megatron_eagle.demo.dataset import LARGE_SIZES, RARE_GRIDS, TASKS, generate, size_for_grid
from megatron_eagle.demo.drawing import COLOURS, SHAPES, ChartScene, CountScene, ShapeScene, draw_scene
from megatron_eagle.demo.questions import ASK

Record = dict
TILE = 64


def eagle2_grid(width: int, height: int) -> tuple[int, int]:
    """Eagle 2's rule in exact arithmetic, written for this test: nearest aspect ratio; a tie goes to a larger grid
    only if the picture covers more than half of it."""
    grids = sorted(((i, j) for i in range(1, 13) for j in range(1, 13) if i * j <= 12), key=lambda g: g[0] * g[1])
    nearest = min(abs(width / height - i / j) for i, j in grids)
    tied = [g for g in grids if math.isclose(abs(width / height - g[0] / g[1]), nearest, abs_tol=1e-12)]
    fitting = [g for g in tied[1:] if 2 * width * height > TILE * TILE * g[0] * g[1]]
    return fitting[-1] if fitting else tied[0]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embedded")
    return {
        "broad": generate(root / "broad", split="train", samples=2500, seed=5).parent,
        "fine": generate(root / "fine", split="train", samples=300, seed=5, quality="fine").parent,
        "heldout": generate(root / "heldout", split="heldout", samples=280, seed=5).parent,
    }


def read(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def pictures(record: Record) -> list[str]:
    paths = record.get("image", [])
    return [paths] if isinstance(paths, str) else paths


def turns(record: Record) -> list[tuple[str, str]]:
    said = [turn["value"].replace("<image>\n", "") for turn in record["conversations"]]
    return list(zip(said[::2], said[1::2], strict=True))


def kind_of(question: str) -> str:
    asked = re.split(r"(?<=\.) (?=\w+ (?:colour|me) |The \w+ has|Name)", question)[-1]
    for kind, wordings in ASK.items():
        for wording in wordings.train + wordings.heldout:
            if re.fullmatch(re.escape(wording).replace(r"\{\}", r"\w+"), asked):
                return kind
    raise AssertionError(f"no wording fits {question!r}")


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate(tmp_path / name, split="train", samples=30, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_records_are_llava_records(sets: dict[str, Path]) -> None:
    everything = {name: read(folder) for name, folder in sets.items()}
    ids = [record["id"] for records in everything.values() for record in records]
    assert len(set(ids)) == len(ids)
    for name, folder in sets.items():
        records = everything[name]
        assert {record["task"] for record in records} == set(TASKS)
        for record in records:
            roles = [turn["from"] for turn in record["conversations"]]
            assert roles == ["human", "gpt"] * (len(roles) // 2) and roles
            first = record["conversations"][0]["value"]
            assert first.startswith("<image>\n" * len(pictures(record))), name
            assert sum(turn["value"].count("<image>") for turn in record["conversations"]) == len(pictures(record))
            assert all((folder / path).is_file() for path in pictures(record))
            assert len(pictures(record)) == {"compare": 2, "text": 0}.get(record["task"], 1)


def test_all_tile_counts_occur_and_large_ones_are_rare(sets: dict[str, Path]) -> None:
    sizes = [Image.open(sets["broad"] / path).size for record in read(sets["broad"]) for path in pictures(record)]
    counts = [math.prod(eagle2_grid(*size)) for size in sizes]
    assert min(min(size) for size in sizes) >= 60
    assert all(width <= 1600 for width, _ in sizes)
    assert {1, 2, 3} <= set(counts)
    assert sum(counts) / len(counts) < 2
    reachable = {math.prod(grid) for grid in RARE_GRIDS} | {1, 2}
    reachable |= {math.prod(eagle2_grid(*size)) for size in LARGE_SIZES}
    assert reachable == set(range(1, 13))
    assert set(counts) == reachable
    assert (1600, 500) in LARGE_SIZES


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), *RARE_GRIDS])
def test_size_for_grid_gives_that_grid(grid: tuple[int, int]) -> None:
    rng = random.Random(0)
    for _ in range(200):
        width, height = size_for_grid(grid, rng)
        assert eagle2_grid(width, height) == grid, (width, height)
        assert min(width, height) >= 60


def test_heldout_pictures_and_wordings_do_not_occur_in_training(sets: dict[str, Path]) -> None:
    def pixels(folder: Path) -> set[str]:
        paths = [folder / path for record in read(folder) for path in pictures(record)]
        return {hashlib.sha256(Image.open(path).tobytes()).hexdigest() for path in paths}

    def questions(folder: Path) -> set[str]:
        return {question for record in read(folder) for question, _ in turns(record)}

    def words(texts: set[str]) -> set[str]:
        return {word for text in texts for word in re.findall(r"\w+", text)}

    train = pixels(sets["broad"]) | pixels(sets["fine"])
    assert len(train) > 1000
    assert not train & pixels(sets["heldout"])
    asked = questions(sets["broad"]) | questions(sets["fine"])
    assert not asked & questions(sets["heldout"])
    assert words(questions(sets["heldout"])) <= words(asked), "a held-out wording uses a word that training never shows"
    for kind, wordings in ASK.items():
        assert not set(wordings.train) & set(wordings.heldout), kind
        assert len(set(wordings.train)) == len(wordings.train) and len(set(wordings.heldout)) == len(wordings.heldout)


def test_no_answer_can_be_guessed_without_looking(sets: dict[str, Path]) -> None:
    """The most frequent answer of each kind of question about a picture is right little more often than by lot."""
    answers: dict[str, list[str]] = {}
    for record in read(sets["broad"]):
        for question, answer in turns(record) if record["task"] != "text" else []:
            answers.setdefault(kind_of(question), []).append(answer)
    for kind, given in answers.items():
        share = max(given.count(answer) for answer in set(given)) / len(given)
        assert share < 1.6 / len(set(given)) + 0.05, (kind, share, len(set(given)))


@functools.cache
def nearest_colour(pixel: tuple[int, int, int]) -> str | None:
    """The palette's colour of a pixel; None for paper, base line and blended edges."""
    distance = {name: max(abs(a - b) for a, b in zip(pixel, value, strict=True)) for name, value in COLOURS.items()}
    name = min(distance, key=distance.__getitem__)
    return name if distance[name] <= 12 else None


def coloured_pixels(image: Image.Image) -> dict[tuple[int, int], str]:
    width, height = image.size
    pixels = image.load()
    seen = ((x, y, nearest_colour(pixels[x, y])) for x in range(width) for y in range(height))
    return {(x, y): colour for x, y, colour in seen if colour}


def components(points: set[tuple[int, int]]) -> int:
    """Connected groups (8 neighbours) of at least 12 pixels."""
    found, left = 0, set(points)
    while left:
        stack, size = [left.pop()], 0
        while stack:
            x, y = stack.pop()
            size += 1
            near = {(x + dx, y + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)} & left
            left -= near
            stack.extend(near)
        found += size >= 12
    return found


def main_colour(points: dict[tuple[int, int], str]) -> str:
    return Counter(points.values()).most_common(1)[0][0]


def chart_reading(points: dict[tuple[int, int], str]) -> dict[str, str]:
    """Tallest bar, first bar and number of bars, measured from the pixels."""
    columns: dict[str, set[int]] = {}
    rows: dict[str, set[int]] = {}
    for (x, y), colour in points.items():
        columns.setdefault(colour, set()).add(x)
        rows.setdefault(colour, set()).add(y)
    bars = [colour for colour in columns if len(rows[colour]) * len(columns[colour]) > 12]
    return {
        "tallest": max(bars, key=lambda colour: len(rows[colour])),
        "first_bar": min(bars, key=lambda colour: min(columns[colour])),
        "bars": str(len(bars)),
    }


def small_records(folder: Path, task: str, limit: int) -> list[tuple[Record, list[Image.Image]]]:
    opened = ((record, [Image.open(folder / path) for path in pictures(record)]) for record in read(folder)
              if record["task"] == task)  # fmt: skip
    return [item for item in opened if all(math.prod(image.size) < 10_000 for image in item[1])][:limit]


MEASURED: dict[str, Callable[[dict[tuple[int, int], str]], dict[str, str]]] = {
    "count": lambda points: {"count": str(components(set(points))), "count_colour": main_colour(points)},
    "shape": lambda points: {"shape_colour": main_colour(points)},
    "number": lambda points: {"ink": main_colour(points)},
    "chart": chart_reading,
}


@pytest.mark.parametrize("task", sorted(MEASURED))
def test_answers_agree_with_the_pixels(sets: dict[str, Path], task: str) -> None:
    checked = 0
    for record, images in small_records(sets["heldout"], task, 20):
        measured = MEASURED[task](coloured_pixels(images[0]))
        for question, answer in turns(record):
            if (kind := kind_of(question)) in measured:
                assert measured[kind] == answer, (record, measured)
                checked += 1
    assert checked >= 15


def test_comparisons_agree_with_the_pixels(sets: dict[str, Path]) -> None:
    checked = 0
    for record, images in small_records(sets["broad"], "compare", 60):
        first, second = (main_colour(coloured_pixels(image)) for image in images)
        for question, answer in turns(record):
            kind = kind_of(question)
            if kind == "same_colour":
                assert answer == ("yes" if first == second else "no")
                checked += 1
            elif kind == "colour_of":
                assert answer == (first if " first " in question else second)
                checked += 1
    assert checked >= 20


def test_lookups_are_answered_by_the_text(sets: dict[str, Path]) -> None:
    checked = 0
    for record in read(sets["heldout"]):
        for question, answer in turns(record) if record["task"] == "text" else []:
            if stated := dict(re.findall(r"The (\w+) is (\w+)\.", question)):
                asked = re.findall(r"the (\w+)", question.split(". ")[-1])[-1]
                assert stated[asked] == answer
                checked += 1
    assert checked >= 30


def test_every_shape_looks_different() -> None:
    masks = {}
    for name, draw in SHAPES.items():
        image = Image.new("1", (100, 100))
        draw(ImageDraw.Draw(image), (0, 0, 99, 99), 1)
        masks[name] = {index for index, on in enumerate(image.get_flattened_data()) if on}
    for one, other in itertools.combinations(masks, 2):
        overlap = len(masks[one] & masks[other]) / len(masks[one] | masks[other])
        assert overlap < 0.9, (one, other, overlap)


def test_impossible_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="not 0"):
        CountScene("red", 0)
    with pytest.raises(ValueError, match="distinct"):
        ChartScene((("red", 0.5), ("blue", 0.5)))
    assert draw_scene(ShapeScene("star", "blue"), (60, 90), random.Random(0)).size == (60, 90)
