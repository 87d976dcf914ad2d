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

from megatron_eagle.config.reading import MAX_PIXELS
from megatron_eagle.errors import BrokenSample

# Raster formats only: Pillow would also hand EPS to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif"}

ORIENTATION_TAG = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


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
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise BrokenSample(f"image of {image.width}x{image.height} has {pixels} pixels, the limit is {max_pixels}")
    if pixels == 0:
        raise BrokenSample(f"image of {image.width}x{image.height} has no pixels")
    # Pillow turns TIFFs itself. A PNG may carry EXIF after its pixels, and Pillow would decode them to look for it:
    # only the header counts.
    if image.format == "TIFF":
        return image, 1
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return image, 1
    with _pillow("read (EXIF)"):
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    return image, orientation if orientation in TRANSPOSE else 1


def read_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of the upright image, from the header alone; raises BrokenSample."""
    image, orientation = _open(data, max_pixels)
    return (image.height, image.width) if orientation in SIDEWAYS else (image.width, image.height)


def read_extension(data: bytes, *, max_pixels: int = MAX_PIXELS) -> str:
    """The file name ending of the format the bytes really have, such as ``png`` or ``jpg``."""
    image, _ = _open(data, max_pixels)
    return EXTENSIONS.get(image.format or "", (image.format or "").lower())


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright RGB image, transparency laid on white; raises BrokenSample.

    max_pixels: width x height above which the file is refused before decoding, as a decompression bomb (Pillow itself
        refuses more than 178,956,970 whatever is allowed here).
    """
    image, orientation = _open(data, max_pixels)
    with _pillow("decoded"):
        image.load()
    image = _to_rgb(image)
    return image.transpose(TRANSPOSE[orientation]) if orientation != 1 else image


def is_plain_jpeg(data: bytes, *, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether this is an upright RGB JPEG, which every decoder understands; raises BrokenSample."""
    image, orientation = _open(data, max_pixels)
    return image.format == "JPEG" and image.mode == "RGB" and orientation == 1


def decode_pixels(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The pixels of ``decode_image``, [H, W, 3], faster: a plain JPEG is decoded straight into them.

    Both are libjpeg-turbo with the same settings and give the same bytes, but Pillow keeps 4 bytes a pixel and copies.
    """
    if is_plain_jpeg(data, max_pixels=max_pixels):
        with contextlib.suppress(ValueError):  # damaged, or only unusual: Pillow decides
            return simplejpeg.decode_jpeg(data)
    return np.asarray(decode_image(data, max_pixels=max_pixels))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise BrokenSample("image holds floating point values, whose range is not known")
    if image.mode.startswith("I"):
        # 16-bit greyscale; Pillow's own conversion would clip it at 255 instead of scaling.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    with _pillow("converted to RGB"):
        if image.has_transparency_data:
            image = image.convert("RGBA")
            canvas = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(canvas, image).convert("RGB")
        return image.convert("RGB")
