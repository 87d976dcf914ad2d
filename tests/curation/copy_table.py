"""How many copies of pictures a hash and a model's vectors find, by what was done to them, and what else they find.

    python tests/curation/copy_table.py PICTURES OTHERS [MODEL SIDE]     # MODEL: TorchScript file, as SSCD's

Copies of PICTURES drawn pictures are looked for among these and OTHERS. Of all that is found, precision is the share
that is the picture it was looked for with. Hashes of 6 and of 10 bits; vectors at a cosine of 0.75, SSCD's, and at the
lowest at which precision is 0.99 on these very pictures, which flatters.
"""

import io
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from megatron_eagle.curation.encoders import image_encoder
from megatron_eagle.curation.hashing import picture_hash


def draw(seed: int) -> Image.Image:
    """A scene of gradients, shapes and lines; every seed has another."""
    rng = random.Random(seed)
    width, height = rng.randint(160, 480), rng.randint(160, 480)
    ramp = (
        np.linspace(0, 1, width)[None, :, None] * rng.random() + np.linspace(0, 1, height)[:, None, None] * rng.random()
    )
    colours = np.array([[rng.random() for _ in range(3)] for _ in range(2)])
    pixels = colours[0] + ramp / max(1e-6, ramp.max()) * (colours[1] - colours[0])
    image = Image.fromarray((pixels * 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(4, 18)):
        x, y = rng.randrange(width), rng.randrange(height)
        box = (x, y, x + rng.randint(10, width // 2), y + rng.randint(10, height // 2))
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        rng.choice((pen.rectangle, pen.ellipse))(box, fill=colour)
    return image


def again(image: Image.Image, quality: int) -> Image.Image:
    """As JPEG and back."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(io.BytesIO(data.getvalue()))


def cropped(image: Image.Image) -> Image.Image:
    """Without a tenth of its width and height, at the edges."""
    width, height = image.size
    return image.crop((width // 20, height // 20, width - width // 20, height - height // 20))


def recoloured(image: Image.Image) -> Image.Image:
    """Another hue and less contrast."""
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.merge(
        "HSV", (hue.point(lambda one: (one + 40) % 256), saturation, value.point(lambda one: 30 + one * 0.8))
    )
    return turned.convert("RGB")


def watermarked(image: Image.Image) -> Image.Image:
    """A line of text across it."""
    copy = image.copy()
    pen = ImageDraw.Draw(copy)
    pen.text((copy.width // 8, copy.height // 2), "(c) example.org", fill="white", font_size=max(10, copy.width // 10))
    return copy


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 40": lambda image: again(image, 40),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "cropped by 10 %": cropped,
    "recoloured": recoloured,
    "watermarked": watermarked,
}


class Hashes:
    """Bits apart, of 64; flat pictures are far from all."""

    def __init__(self) -> None:
        self.limits = {"hash, 6 bits": 6.0, "hash, 10 bits": 10.0}

    def prints(self, pictures: list[Image.Image]) -> Any:
        """One hash each."""
        return np.array([picture_hash(one) or 0 for one in pictures], dtype=np.uint64)

    def apart(self, copies: Any, known: Any) -> Any:
        """[copies, known]."""
        far = (copies[:, None] == 0) | (known[None] == 0)
        return np.where(far, 65, np.bitwise_count(copies[:, None] ^ known[None]))


class VectorsOf:
    """1 - cosine."""

    def __init__(self, model: str, side: int) -> None:
        self.encoder = image_encoder(model, side, 16, "auto")
        self.limits = {"vector, cosine 0.75": 0.25}

    def prints(self, pictures: list[Image.Image]) -> Any:
        """One vector each."""
        return self.encoder([one.convert("RGB") for one in pictures])

    def apart(self, copies: Any, known: Any) -> Any:
        """[copies, known]."""
        return 1.0 - copies @ known.T


def in_parts(many: int, change: Callable[[Image.Image], Image.Image] | None = None) -> Iterator[list[Image.Image]]:
    """Drawn pictures, or what is made of them, a few hundred at a time."""
    for low in range(0, many, 256):
        drawn = [draw(seed) for seed in range(low, min(many, low + 256))]
        yield drawn if change is None else [change(one) for one in drawn]


def strict(apart: Any, own: Any) -> float:
    """The largest limit at which 99 of 100 that are found are right. apart: [copies, known]. own: right of each."""
    values = np.sort(apart.ravel())[: 20 * len(own)]
    rights = np.sort(apart[np.arange(len(own)), own])
    found = np.searchsorted(values, rights, side="right")
    good = np.arange(1, len(rights) + 1) >= 0.99 * found
    return float(rights[good][-1]) if good.any() else -1.0


def main(pictures: int, others: int, model: str | None = None, side: int = 320) -> None:
    """Prints the table: recall by kind of copy, and precision over all."""
    methods: list[Any] = [Hashes(), *([VectorsOf(model, side)] if model else [])]
    known: list[list[Any]] = [[] for _ in methods]
    for part in in_parts(pictures + others):
        for prints, method in zip(known, methods, strict=True):
            prints.append(method.prints(part))
    own = np.arange(pictures)
    columns: dict[str, list[float]] = {}
    for prints, method in zip(known, methods, strict=True):
        every = np.concatenate(prints)
        tables = [
            method.apart(np.concatenate([method.prints(part) for part in in_parts(pictures, change)]), every)
            for change in COPIES.values()
        ]
        limits = dict(method.limits)
        if isinstance(method, VectorsOf):
            limit = strict(np.concatenate(tables), np.tile(own, len(tables)))
            limits[f"vector, cosine {1 - limit:.4f}"] = limit
        for name, limit in limits.items():
            right = [float((table[own, own] <= limit).mean()) for table in tables]
            found = sum(int((table <= limit).sum()) for table in tables)
            columns[name] = [*right, sum(right) * pictures / max(1, found)]
    print(f"{pictures} pictures among {others} others, {len(COPIES)} copies of each")
    print(f"| copy | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for number, name in enumerate([*COPIES, "precision of all"]):
        print(f"| {name} | {' | '.join(f'{column[number]:.3f}' for column in columns.values())} |")


if __name__ == "__main__":
    given = sys.argv[1:] or ["500", "5000"]
    main(int(given[0]), int(given[1]), *given[2:3], *(int(one) for one in given[3:4]))
