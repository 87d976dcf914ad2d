# Copyright 2026 the megatron-eagle authors. Licensed under the Apache License, Version 2.0.
"""A picture of any kind -> upright RGB: turned as its EXIF says, transparency on white, 16 bits scaled to 8.

The trainer's pictures go through these very functions, and a copy of this file is part of every exported folder.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .frames_eagle import MAX_PIXELS

# Raster formats only: Pillow would also hand EPS to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


def check_size(image: Image.Image, max_pixels: int) -> None:
    """Raises ValueError for a picture of no pixels, or of more than ``max_pixels``, which are not decoded then."""
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise ValueError(f"image of {image.width}x{image.height} has {pixels} pixels, the limit is {max_pixels}")
    if pixels == 0:
        raise ValueError(f"image of {image.width}x{image.height} has no pixels")


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 (upright) to 8, of a picture that Pillow has opened, from its header."""
    # Pillow turns TIFFs itself. A PNG may carry EXIF after its pixels, and Pillow would decode them to look for it:
    # only the header counts.
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    found = image.getexif().get(_ORIENTATION_TAG, 1)
    return found if found in _TRANSPOSE else 1


def upright(image: Image.Image, turned: int) -> Image.Image:
    """``image`` turned from EXIF's orientation ``turned``."""
    return image if turned == 1 else image.transpose(_TRANSPOSE[turned])


def to_rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits; ValueError where the values' range is not known."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ValueError("image holds floating point values, whose range is not known")
    if image.mode.startswith("I"):
        # 16-bit greyscale; Pillow's own conversion would clip it at 255 instead of scaling.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def read_picture(given: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright RGB picture of a Pillow image, a file's path or bytes, or pixels uint8 [H, W, 3] or [3, H, W].

    ValueError or Pillow's own errors say what is wrong with it.
    """
    if isinstance(given, str | Path):
        with Image.open(given, formats=FORMATS) as opened:
            return read_picture(opened, max_pixels)
    if isinstance(given, bytes):
        return read_picture(Image.open(io.BytesIO(given), formats=FORMATS), max_pixels)
    if not isinstance(given, Image.Image):
        pixels = np.asarray(given)
        if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
            pixels = pixels.transpose(1, 2, 0)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"pixels should be uint8 [H, W, 3], are {pixels.dtype} {list(pixels.shape)}")
        given = Image.fromarray(np.ascontiguousarray(pixels))
    check_size(given, max_pixels)
    turned = orientation(given)
    given.load()
    return upright(to_rgb(given), turned)
