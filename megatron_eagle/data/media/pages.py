"""Pages of a PDF document as pictures, by PDFium (pypdfium2, the extra ``documents``).

A data set is built with pages already drawn, as PNG or JPEG files in its shards, so that readers of a run know nothing
of documents and no page depends on the version of a renderer. PDF is a large format and its files come from
everywhere: sizes are looked at before anything is drawn. PDFium's errors mean a broken file.
"""

import io
from collections.abc import Iterator
from typing import Any

from PIL import Image

from megatron_eagle.config.reading import MAX_PIXELS
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.media.sniff import HEAD, sniff
from megatron_eagle.errors import BrokenSample

Ranges = tuple[tuple[int, int], ...]  # (first, last) pages, from 1, ascending; none: all pages

DOTS_PER_INCH = 150  # A4 is 1240x1754, about what 3x4 tiles of 448 can show of it
MAX_SIDE = 4096  # pixels; a larger page is drawn with fewer dots an inch
MAX_POINTS = 14_400  # side of a page, 200 inches: the most that PDF readers must take (ISO 32000-1, annex C.2)
MAX_PAGES = 1000  # shown of one document; 512 of one tile each fill a pack of 131 072 tokens
MAX_BYTES = 256 * 1024 * 1024
MAX_PNG = 1024 * 1024  # bytes; a page that is more, such as a scan, becomes a JPEG
JPEG_QUALITY = 95


def read_pages(file: FileSlice, ranges: Ranges, *, max_pixels: int = MAX_PIXELS) -> list[bytes]:
    """The pages of a PDF as image files; raises BrokenSample, and OSError if the file cannot be read.

    max_pixels: of a page as drawn, and of every picture in it, so that none is a decompression bomb.
    """
    if file.size > MAX_BYTES:
        raise BrokenSample(f"document of {file.size} bytes, the limit is {MAX_BYTES}")
    pdfium = _pdfium()
    data = file.read()
    try:
        with pdfium.PdfDocument(data) as document:
            numbers = _chosen(len(document), ranges)
            for number in numbers:
                width, height = document.get_page_size(number - 1)
                _check_size(number, width, height, max_pixels)
            document.init_forms()
            return [_encoded(_draw(pdfium, document[number - 1], number, max_pixels)) for number in numbers]
    except pdfium.PdfiumError as error:
        found = sniff(data[:HEAD]).name or "of no known format"
        if found != "PDF":
            raise BrokenSample(f"document is {found}, not PDF") from None
        if "password" in str(error):
            raise BrokenSample("document needs a password") from None
        raise BrokenSample(f"document is damaged or has no pages ({error})") from None


def _pdfium() -> Any:
    try:
        import pypdfium2
    except ImportError:
        raise BrokenSample("documents are read by pypdfium2: pip install 'megatron-eagle[documents]'") from None
    return pypdfium2


def _chosen(pages: int, ranges: Ranges) -> list[int]:
    if not pages:
        raise BrokenSample("document has no pages")
    for first, last in ranges:
        if last > pages:
            asked = f"page {last}" if first == last else f"pages {first}-{last}"
            raise BrokenSample(f"{asked} of a document of {pages} pages")
    ranges = ranges or ((1, pages),)
    count = sum(last - first + 1 for first, last in ranges)
    if count > MAX_PAGES:
        raise BrokenSample(f"{count} pages of a document, the limit is {MAX_PAGES}: say which ('pages': \"1-100\")")
    return [number for first, last in ranges for number in range(first, last + 1)]


def _scale(width: float, height: float) -> float:
    """Pixels a point; a little less, so that PDFium's rounding up makes no pixel out of an error of rounding."""
    return min(DOTS_PER_INCH / 72, MAX_SIDE / max(width, height)) * (1 - 1e-6)


def _check_size(number: int, width: float, height: float, max_pixels: int) -> None:
    """width, height: in points, 1/72 inch."""
    if not (1 <= width <= MAX_POINTS and 1 <= height <= MAX_POINTS):
        raise BrokenSample(f"page {number} of {width:g}x{height:g} points, a side must be from 1 to {MAX_POINTS}")
    scale = _scale(width, height)
    if width * height * scale * scale > max_pixels:
        pixels = int(width * height * scale * scale)
        raise BrokenSample(
            f"page {number} of {width:g}x{height:g} points has {pixels} pixels, the limit is {max_pixels}"
        )


def _draw(pdfium: Any, page: Any, number: int, max_pixels: int) -> Image.Image:
    for width, height in _pictures(pdfium, page):
        if width * height > max_pixels:
            raise BrokenSample(
                f"page {number} holds a picture of {width}x{height}, {width * height} pixels, the limit is {max_pixels}"
            )
    picture: Image.Image = page.render(scale=_scale(*page.get_size())).to_pil()
    return picture.convert("RGB")


def _pictures(pdfium: Any, page: Any) -> Iterator[tuple[int, int]]:
    """Sizes of the pictures of a page, which are not decoded for it."""
    for found in page.get_objects(filter=[pdfium.raw.FPDF_PAGEOBJ_IMAGE]):
        yield found.get_px_size()


def _encoded(picture: Image.Image) -> bytes:
    red, green, blue = (band.tobytes() for band in picture.split())
    if red == green == blue:  # most pages are black on white: a third of the bytes, the same picture
        picture = picture.getchannel(0)
    png = io.BytesIO()
    picture.save(png, "PNG")
    if png.tell() <= MAX_PNG:
        return png.getvalue()
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return jpeg.getvalue()
