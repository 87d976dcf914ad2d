"""What scanning, photographing and storing does to a page: rotation, blur, uneven light, grain."""

import random

import numpy as np
from PIL import Image, ImageFilter

LEVELS = ("none", "light", "strong")


def spoiled(image: Image.Image, level: str, choose: random.Random) -> Image.Image:
    """The page as a camera would see it; ``none`` gives it back."""
    if level == "none":
        return image
    strength = 0.4 if level == "light" else 1.0
    paper = image.getpixel((0, 0))
    turned = image.rotate(choose.uniform(-3, 3) * strength, Image.Resampling.BICUBIC, expand=True, fillcolor=paper)
    soft = turned.filter(ImageFilter.GaussianBlur(choose.uniform(0.2, 1.1) * strength))
    pixels = np.asarray(soft, dtype=np.float32)
    light = np.linspace(1.0, 1.0 - choose.uniform(0, 0.35) * strength, pixels.shape[1], dtype=np.float32)
    grain = np.random.default_rng(choose.getrandbits(64)).normal(0, 14 * strength, pixels.shape[:2])
    lit = pixels * light[None, :, None] + grain[:, :, None].astype(np.float32)
    return Image.fromarray(np.clip(np.rint(lit), 0, 255).astype(np.uint8))
