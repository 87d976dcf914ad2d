"""How many copies of pictures a perceptual hash finds, by what was done to them, and what else it takes for one."""

import io
import random
import sys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from megatron_eagle.curation.hashing import near_pairs, picture_hash


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


def main(pictures: int, others: int, distance: int) -> None:
    """Prints the table."""
    known = {seed: own for seed in range(pictures + others) if (own := picture_hash(draw(seed))) is not None}
    hashes = np.array(list(known.values()), dtype=np.uint64)
    wrong = sum(len(first) for first, _ in near_pairs(np.unique(hashes), distance))
    print(
        f"{len(known)} of {pictures + others} pictures have a hash; pairs of different ones within {distance}: {wrong}"
    )
    for name, change in COPIES.items():
        copies = ((known[seed], picture_hash(change(draw(seed)))) for seed in range(pictures) if seed in known)
        apart = [64 if other is None else (own ^ other).bit_count() for own, other in copies]
        shares = " | ".join(
            f"{sum(one <= most for one in apart) / len(apart):.3f}" for most in (distance, distance + 4)
        )
        print(f"| {name} | {shares} |")


if __name__ == "__main__":
    main(*(int(one) for one in (sys.argv[1:] or ("500", "5000", "6"))))
