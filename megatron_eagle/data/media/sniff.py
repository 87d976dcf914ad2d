"""What a file is by its first bytes, whatever it is called: a picture, a video, a document, or something else.

Only formats that ``images.py``, FFmpeg and PDFium decode count as pictures, videos and documents; the others get a
name, for the reason why they are refused. Sources: the formats' own specifications, as collected in the ``file``
command's magic numbers.
"""

from dataclasses import dataclass
from typing import Literal

HEAD = 512  # bytes that decide; a tar's mark is at 257

_STARTS: tuple[tuple[bytes, Literal["image", "video", "document", "other"], str], ...] = (
    (b"\xff\xd8\xff", "image", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "image", "PNG"),
    (b"GIF87a", "image", "GIF"),
    (b"GIF89a", "image", "GIF"),
    (b"II*\0", "image", "TIFF"),
    (b"MM\0*", "image", "TIFF"),
    (b"II+\0", "image", "TIFF"),
    (b"MM\0+", "image", "TIFF"),
    (b"\x1aE\xdf\xa3", "video", "Matroska"),
    (b"\0\0\x01\xba", "video", "MPEG"),
    (b"\0\0\x01\xb3", "video", "MPEG"),
    (b"FLV\x01", "video", "FLV"),
    (b"0&\xb2u\x8ef\xcf\x11", "video", "ASF"),
    (b"OggS", "video", "Ogg"),
    (b"%PDF-", "document", "PDF"),
    (b"\x1f\x8b", "other", "gzip"),
    (b"PK\x03\x04", "other", "zip"),
    (b"PAR1", "other", "Parquet"),
    (b"(\xb5/\xfd", "other", "zstd"),
    (b"BZh", "other", "bzip2"),
    (b"\xfd7zXZ\0", "other", "xz"),
    (b"\xff\x0a", "other", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "other", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "other", "JPEG 2000"),
    (b"8BPS", "other", "Photoshop"),
    (b"\x93NUMPY", "other", "NumPy"),
    (b"\x89HDF", "other", "HDF5"),
    (b"fLaC", "other", "FLAC sound"),
    (b"ID3", "other", "MP3 sound"),
)
# Brands of an ISO base media file that are pictures, which Pillow is not asked to decode here.
_PICTURE_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"crx ": "CR3"}
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_QUICKTIME_ATOMS = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)


@dataclass(frozen=True)
class Content:
    """kind: picture, video, document, a known format of none of them, or None if unknown. name: of the format."""

    kind: Literal["image", "video", "document", "other"] | None
    name: str = ""


def sniff(head: bytes) -> Content:
    """What a file that begins with these bytes (HEAD of them, or all it has) is."""
    for start, kind, name in _STARTS:
        if head.startswith(start):
            return Content(kind, name)
    if head[:4] == b"RIFF":
        return {b"WEBP": Content("image", "WEBP"), b"AVI ": Content("video", "AVI")}.get(
            head[8:12], Content("other", "RIFF")
        )
    if head[4:8] == b"ftyp":
        return _iso_media(head)
    if head[4:8] in _QUICKTIME_ATOMS:
        return Content("video", "QuickTime")
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return Content("image", "BMP")
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return Content("image", "PPM")
    if head[:1] == b"G" and len(head) > 376 and head[188:189] == head[376:377] == b"G":
        return Content("video", "MPEG-TS")
    if head[257:262] == b"ustar":
        return Content("other", "tar")
    return Content(None)


def _iso_media(head: bytes) -> Content:
    brand = head[8:12]
    if brand in _HEIF_BRANDS:
        # An AVIF may call itself a HEIF first and AVIF among the compatible brands.
        size = int.from_bytes(head[:4], "big")
        return Content("other", "AVIF" if b"avif" in head[16:size] else "HEIF")
    if brand in _PICTURE_BRANDS:
        return Content("other", _PICTURE_BRANDS[brand])
    return Content("other", "M4A sound") if brand == b"M4A " else Content("video", "MP4")
