"""Image files of every odd kind become upright RGB, damaged ones a BrokenSample."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from megatron_eagle.data.media.images import decode_image, decode_pixels, read_extension, read_size
from megatron_eagle.errors import BrokenSample

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def flag(mode="RGB", size=(40, 20)):
    """Red left half, blue right half."""
    image = Image.new("RGB", size, RED)
    ImageDraw.Draw(image).rectangle([size[0] // 2, 0, size[0], size[1]], fill=BLUE)
    return image.convert(mode)


def near(pixel, colour, tolerance=4):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(format):
    data = encode(flag(), format)
    image = decode_image(data)
    assert image.mode == "RGB" and read_size(data) == image.size == (40, 20)
    assert near(image.getpixel((4, 10)), RED) and near(image.getpixel((35, 10)), BLUE)
    assert read_extension(data) == {"JPEG": "jpg", "TIFF": "tif"}.get(format, format.lower())


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(format, orientation):
    """The file's pixels are laid down so that a viewer that obeys EXIF shows the flag: the oracle is Pillow's own."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(flag(size=(48, 16)), format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image = decode_image(data)
    assert read_size(data) == image.size == ((16, 48) if orientation >= 5 else (48, 16))
    assert (np.asarray(image) == np.asarray(upright)).all()


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (5, 0, 10, 10))
    image.paste((255, 0, 0, 128), (0, 5, 5, 10))
    pixels = decode_image(encode(image))
    assert pixels.getpixel((1, 1)) == WHITE and pixels.getpixel((8, 1)) == BLUE
    assert near(pixels.getpixel((1, 8)), (255, 127, 127))


def test_palette_with_transparent_entry():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.paste(1, (4, 0, 8, 8))
    assert decode_image(encode(image, transparency=0)).getpixel((0, 0)) == WHITE
    assert decode_image(encode(image)).getpixel((0, 0)) == (0, 0, 0)
    assert decode_image(encode(image)).getpixel((7, 7)) == BLUE


def test_colour_key_transparency():
    data = encode(Image.new("RGB", (4, 4), RED), transparency=RED)
    assert decode_image(data).getpixel((0, 0)) == WHITE


def test_grey_with_alpha():
    assert decode_image(encode(Image.new("LA", (4, 4), (0, 0)))).getpixel((0, 0)) == WHITE


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    decoded = np.asarray(decode_image(encode(Image.fromarray(ramp))))
    assert (decoded == (ramp >> 8).astype(np.uint8)[..., None]).all()


def test_one_bit_and_cmyk():
    assert decode_image(encode(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == WHITE
    assert near(decode_image(encode(flag("CMYK"), "JPEG", quality=95)).getpixel((4, 10)), RED, 12)


def test_floating_point_is_refused():
    with pytest.raises(BrokenSample, match="floating point"):
        decode_image(encode(Image.new("F", (4, 4), 0.5), "TIFF"))


def test_size_comes_from_the_header():
    data = encode(flag(size=(400, 300)), "JPEG")
    header = data[: len(data) // 2]
    assert read_size(header) == (400, 300)
    with pytest.raises(BrokenSample, match="cannot be decoded.*truncated"):
        decode_image(header)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 20}, {"turned": 6}])
def test_fast_jpeg_gives_the_same_pixels(mode, options):
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 4), dtype=np.uint8)
    image = Image.fromarray(noise[..., 0] if mode == "L" else noise[..., : len(mode)])
    exif = Image.Exif()
    exif[0x0112] = options.get("turned", 1)
    data = encode(image.convert(mode) if mode == "CMYK" else image, "JPEG", exif=exif, **options)
    for file in (data, data + b"more"):
        assert np.array_equal(decode_pixels(file), np.asarray(decode_image(file)))


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"hello, this is text", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0"]
)
def test_what_is_not_an_image(data):
    for function in (read_size, decode_image):
        with pytest.raises(BrokenSample):
            function(data)


def test_bomb_limit_is_an_argument():
    data = encode(Image.new("L", (300, 200)))
    assert decode_image(data, max_pixels=60_000).size == (300, 200)
    for function in (read_size, decode_image):
        with pytest.raises(BrokenSample, match="300x200 has 60000 pixels, the limit is 59999"):
            function(data, max_pixels=59_999)


def test_pillows_own_bomb_limit_is_a_broken_sample():
    header = bytearray(encode(Image.new("1", (8, 8))))
    header[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(BrokenSample, match="decompression bomb"):
        read_size(bytes(header), max_pixels=10**12)


FILES = [encode(flag(), f) for f in ("PNG", "JPEG", "WEBP", "GIF", "TIFF")]


@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=6),
    st.integers(0, 5000),
)
@settings(max_examples=300, deadline=None)
def test_damaged_files_decode_or_are_broken(data, changes, cut):
    damaged = bytearray(data)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    damaged = bytes(damaged[: cut % (len(damaged) + 1)])
    try:
        image = decode_image(damaged, max_pixels=10**6)
    except BrokenSample as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB" and image.size == read_size(damaged)
        assert np.array_equal(decode_pixels(damaged, max_pixels=10**6), np.asarray(image))
