"""Bytes of an image file -> upright RGB picture, or a BrokenSample that says why not.

Training data comes from everywhere: rotated phone photos, transparent logos, print-ready CMYK, 16-bit scans, files cut
off by a full disk. All of it is made into plain RGB in one place. The size is read from the header, so that token
counts are known without decoding. Pillow may raise almost anything on damaged bytes, so every exception that comes
out of Pillow's own calls means a broken file; our own code is kept out of those blocks.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from megatron_eagle.errors import BrokenSample
from megatron_eagle.remote_code.pictures_eagle import (
    FORMATS,
    MAX_PIXELS,
    SIDEWAYS,
    check_size,
    orientation,
    to_rgb,
    upright,
)

EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif"}


@contextmanager
def _pillow(doing: str) -> Iterator[None]:
    """Runs Pillow calls only: whatever they raise is the file's fault, except running out of memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise BrokenSample(f"not an image in a known format ({', '.join(FORMATS)})") from None
    except Exception as error:
        raise BrokenSample(f"image cannot be {doing}: {error or type(error).__name__}") from error


def _open(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """The undecoded image and its EXIF orientation, 1 (upright) to 8."""
    with _pillow("opened"):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    try:
        check_size(image, max_pixels)
    except ValueError as error:
        raise BrokenSample(str(error)) from None
    with _pillow("read (EXIF)"):
        return image, orientation(image)


def read_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of the upright image, from the header alone; raises BrokenSample."""
    image, turned = _open(data, max_pixels)
    return (image.height, image.width) if turned in SIDEWAYS else (image.width, image.height)


def read_extension(data: bytes, *, max_pixels: int = MAX_PIXELS) -> str:
    """The file name ending of the format the bytes really have, such as ``png`` or ``jpg``."""
    image, _ = _open(data, max_pixels)
    return EXTENSIONS.get(image.format or "", (image.format or "").lower())


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright RGB image, transparency laid on white; raises BrokenSample.

    max_pixels: width x height above which the file is refused before decoding, as a decompression bomb (Pillow itself
        refuses more than 178,956,970 whatever is allowed here).
    """
    image, turned = _open(data, max_pixels)
    with _pillow("decoded"):
        image.load()
    with _pillow("converted to RGB"):
        image = to_rgb(image)
    return upright(image, turned)


def is_plain_jpeg(data: bytes, *, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether this is an upright RGB JPEG, which every decoder understands; raises BrokenSample."""
    image, turned = _open(data, max_pixels)
    return image.format == "JPEG" and image.mode == "RGB" and turned == 1


def decode_pixels(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The pixels of ``decode_image``, [H, W, 3], faster: a plain JPEG is decoded straight into them.

    Both are libjpeg-turbo with the same settings and give the same bytes, but Pillow keeps 4 bytes a pixel and copies.
    """
    if is_plain_jpeg(data, max_pixels=max_pixels):
        with contextlib.suppress(ValueError):  # damaged, or only unusual: Pillow decides
            return simplejpeg.decode_jpeg(data)
    return np.asarray(decode_image(data, max_pixels=max_pixels))
