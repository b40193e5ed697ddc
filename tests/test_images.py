"""Images: every form a caller has them in, and every way they can be wrong."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageOps

from modelscope_i2v.errors import InvalidInputError
from modelscope_i2v.media import images
from modelscope_i2v.media.images import open_image

RGB = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


PNG = encoded(Image.fromarray(RGB), "PNG")


def pixels(source) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


FILES = (
    "1 PNG, 1 TIFF, 1 BMP, L PNG, L JPEG, L GIF, L BMP, L TIFF, L WEBP, P PNG, P GIF, P BMP, P TIFF, P TGA, "
    "RGB PNG, RGB JPEG, RGB GIF, RGB BMP, RGB TIFF, RGB WEBP, RGB PPM, RGB TGA, RGB ICO, RGBA PNG, RGBA GIF, "
    "RGBA BMP, RGBA TIFF, RGBA WEBP, RGBA TGA, RGBA ICO, LA PNG, LA TIFF, CMYK JPEG, CMYK TIFF"
)


@pytest.mark.parametrize("kind", FILES.split(", "))
@pytest.mark.filterwarnings("ignore:Palette images")
def test_files_as_modelscope_reads_them(kind):
    mode, file_format = kind.split()
    image = Image.fromarray(np.dstack([RGB, RGB[:, :, 0]])).resize((16, 24))
    data = encoded((image.convert("RGB") if mode == "CMYK" else image).convert(mode), file_format)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(pixels(data), np.asarray(expected))


@pytest.mark.parametrize("mode", "1 L P RGB RGBA LA PA RGBX CMYK YCbCr HSV I F".split())
def test_pillow_images_as_modelscope_takes_them(mode):
    image = Image.fromarray(RGB).convert(mode)
    before = image.tobytes()
    result = open_image(image)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(image.convert("RGB")))
    result.putpixel((0, 0), (1, 2, 3))
    assert image.tobytes() == before


def test_alpha_is_dropped_not_blended():
    image = Image.new("RGBA", (2, 2), (200, 100, 50, 0))
    for source in (image, encoded(image, "PNG"), np.asarray(image)[:, :, [2, 1, 0, 3]]):
        assert open_image(source).getpixel((0, 0)) == (200, 100, 50)


@pytest.mark.parametrize("transparency", [3, bytes([0, 255, 7])])
def test_palette_with_transparency(transparency, recwarn):
    data = encoded(Image.fromarray(RGB).quantize(8), "PNG", transparency=transparency)
    result = pixels(data)
    assert not recwarn
    np.testing.assert_array_equal(result, np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[:, :, :3])


def test_premultiplied_alpha():
    image = Image.new("RGBA", (2, 2), (200, 100, 50, 128)).convert("RGBa")
    assert np.abs(np.subtract(open_image(image).getpixel((0, 0)), (200, 100, 50))).max() <= 2


def test_lab():
    image = Image.merge("LAB", [Image.new("L", (2, 2), v) for v in (255, 128, 128)])
    assert np.asarray(open_image(image)).min() >= 250  # L* 100 is white


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "TIFF tiff_lzw", "WEBP"])
def test_exif_orientation_of_files(orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file_format, _, compression = file_format.partition(" ")
    options = {"WEBP": {"lossless": True, "exif": exif}, "PNG": {"exif": exif}}.get(
        file_format, {"tiffinfo": {0x0112: orientation}, "compression": compression or None}
    )
    data = encoded(Image.fromarray(RGB), file_format, **options)
    turned = RGB.transpose(1, 0, 2) if orientation > 4 else RGB
    vertical, horizontal = (-1 if orientation in flipped else 1 for flipped in ((3, 4, 7, 8), (2, 3, 6, 7)))
    expected = turned[::vertical, ::horizontal]
    result = open_image(data)
    np.testing.assert_array_equal(np.asarray(result), expected)
    assert result.size == ((9, 7) if orientation > 4 else (7, 9))
    np.testing.assert_array_equal(pixels(result), np.asarray(result))  # not turned twice


def test_exif_orientation_of_a_pillow_image_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(Image.fromarray(RGB), "PNG", exif=exif)))
    np.testing.assert_array_equal(pixels(image), RGB)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_matter():
    data = encoded(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    np.testing.assert_array_equal(pixels(data), RGB)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(file_format):
    grey = np.array([[0, 128, 129, 257, 32768, 65279, 65535]], np.uint16)
    if file_format == "PPM":
        data = b"P5 7 1 65535\n" + grey.astype(">u2").tobytes()
    else:
        data = encoded(Image.fromarray(grey), file_format)
    np.testing.assert_array_equal(pixels(data)[0], np.rint(grey[0] / 257)[:, None].repeat(3, 1))
    dark = (grey * 0 + 200).astype(np.uint16)
    if file_format == "PPM":
        data = b"P5 7 1 65535\n" + dark.astype(">u2").tobytes()
    else:
        data = encoded(Image.fromarray(dark), file_format)
    assert pixels(data).max() == 1  # a dark image, not 200


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_pillow_images(mode):
    grey = np.array([[0, 257, 65535]], np.uint16).astype(">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (3, 1), grey.tobytes())
    assert pixels(image)[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[0, 200]], np.int32), [0, 200]),
        (np.array([[0.0, 1.0]], np.float32), [0, 255]),
        (np.array([[0.0, 200.0]], np.float32), [0, 200]),
    ],
)
def test_32_bit_pillow_images(values, expected):
    assert pixels(Image.fromarray(values))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    "values",
    [np.array([[-1, 3]], np.int32), np.array([[0, 65536]], np.int32), np.array([[0, np.nan]], np.float32),
     np.array([[-0.5, 1]], np.float32), np.array([[0, np.inf]], np.float32)],
)  # fmt: skip
def test_32_bit_values_out_of_range(values):
    with pytest.raises(InvalidInputError, match="allowed are 0 to"):
        open_image(Image.fromarray(values))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(file_format):
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    data = encoded(first, file_format, save_all=True, append_images=[second])
    assert np.abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 4


def test_array_orders():
    bgr = RGB[:, :, ::-1]
    np.testing.assert_array_equal(pixels(bgr), RGB)
    np.testing.assert_array_equal(pixels(np.dstack([bgr, bgr[:, :, 0]])), RGB)
    for grey in (RGB[:, :, 0], RGB[:, :, :1]):
        np.testing.assert_array_equal(pixels(grey), RGB[:, :, :1].repeat(3, 2))
    np.testing.assert_array_equal(pixels(bgr[::2, ::-2]), RGB[::2, ::-2])


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_uint16_arrays(dtype):
    np.testing.assert_array_equal(pixels((RGB[:, :, ::-1].astype(dtype) * 257)), RGB)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays(dtype):
    np.testing.assert_array_equal(pixels((RGB[:, :, ::-1] / 255).astype(dtype)), RGB)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((4, 4, 2), np.uint8), r"uint8, shape \(4, 4, 2\).*allowed are \[H, W, 3\] BGR"),
        (np.zeros((3, 4, 4, 3), np.uint8), "unknown layout"),
        (np.zeros(5, np.uint8), "unknown layout"),
        (np.array(None), "unknown layout"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels: 4x0"),
        (np.zeros((4, 4), bool), "values of type bool: allowed are uint8"),
        (np.zeros((4, 4, 3), np.int64), "values of type int64"),
        (np.zeros((4, 4), object), "values of type object"),
        (np.full((4, 4), 200, np.uint16), "look alike"),
        (np.full((4, 4), 2.0), "values from 2 to 2"),
        (np.full((4, 4), np.nan), "values from nan"),
        (np.full((4, 4), -0.1), "values from -0.1"),
        (np.ma.masked_array(RGB, RGB > 200), r"masked array: fill it"),
        (np.zeros((1, images.MAX_SIDE + 1), np.uint8), "too large: 20001x1; allowed are 20,000 pixels"),
    ],
)
def test_arrays_that_are_no_images(array, words):
    with pytest.raises(InvalidInputError, match=words):
        open_image(array)


class BadPath:
    def __fspath__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize("source", [None, 5, {"image": 1}, [PNG], object(), open_image, io.BytesIO(PNG)])
def test_things_that_are_no_images(source):
    with pytest.raises(InvalidInputError, match="give a path, a URL, bytes, a Pillow image or a NumPy array"):
        open_image(source)


def test_faulty_objects():
    closed = Image.open(io.BytesIO(PNG))
    closed.close()
    for source in (BadPath(), closed, Image.new("RGB", (0, 4))):
        with pytest.raises(InvalidInputError):
            open_image(source)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "0 bytes"),
        (b"<!DOCTYPE html>\n<html>", "an HTML page"),
        (b"\n<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b'{"error": "no"}', "a JSON text"),
        ("Прошу прощения".encode() * 9, "a text"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "an MP4 or QuickTime file"),
        (b"\x1aE\xdf\xa3\0\0", "a Matroska or WebM video"),
        (b"%PDF-1.7", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript document"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\xf0\x0f\x81\x02" * 90, "no known kind of file"),
        (PNG[:20], "a PNG image, damaged"),
        (PNG[:-40], "damaged or incomplete: image file is truncated"),
    ],
)
def test_files_that_are_no_images(tmp_path, data, words):
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(InvalidInputError, match=words if data else "empty"):
            open_image(source)


def test_extension_does_not_matter(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(PNG)
    np.testing.assert_array_equal(pixels(path), RGB)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (10_000, 8_000)])
def test_allowed_sizes(size):
    assert open_image(encoded(Image.new("1", size), "PNG")).size == size


@pytest.mark.parametrize(
    "size", [(20_001, 1), (1, 20_001), (13_400, 13_300), (19_000, 19_000), (60_000, 60_000)]
)
@pytest.mark.filterwarnings("error")
def test_too_large_sizes_are_refused_before_decoding(size):
    # Only the header: should anything try to decode it, the message would be another.
    data = encoded(Image.new("1", (1, 1)), "BMP")
    data = data[:18] + b"".join(side.to_bytes(4, "little") for side in size) + data[26:]
    with pytest.raises(InvalidInputError, match="too large.*are 20,000 pixels a side and 178,000,000"):
        open_image(data)


def test_the_limit_is_on_the_header(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 62)
    for source in (PNG, Image.fromarray(RGB), RGB):
        with pytest.raises(InvalidInputError, match="7x9; allowed are 20,000 pixels a side and 62 in all"):
            open_image(source)


def progressive(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again; around them, what looks like more."""
    data = encoded(Image.fromarray(RGB).resize((64, 64)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    more = data[last:-2] * (scans - data.count(b"\xff\xda"))
    return data[:2] + b"\xff\xfe\0\x42" + b"\xff\xda" * 32 + data[2:-2] + more + data[-2:] + b"\xff\xda" * 999


def test_scans_of_a_jpeg_are_bounded():
    assert pixels(progressive(images.MAX_SCANS)).shape == (64, 64, 3)
    with pytest.raises(InvalidInputError, match="more than the 100 scans allowed"):
        open_image(progressive(images.MAX_SCANS + 1))


def test_runs_of_bytes_that_are_nearly_markers_take_no_time():
    data = progressive(20)
    at = data.index(b"\xff\xda", 200)
    with pytest.raises(InvalidInputError, match="damaged"):
        open_image(data[:at] + b"\xff" * 3_000_000 + b"\0")


def tiled(side: int, image_side: int) -> bytes:
    """A TIFF of one compressed tile, cut short: what decodes it takes the memory of it whole."""
    entries = [(256, image_side), (257, image_side), (258, 8), (259, 8), (262, 1), (277, 1), (322, side),
               (323, side), (324, 8), (325, 4)]  # fmt: skip
    directory = len(entries).to_bytes(2, "little") + b"".join(
        tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in entries
    )
    return b"II*\0\x0c\0\0\0x\x9c\3\0" + directory + bytes(4)


def test_tiles_of_a_tiff_are_bounded():
    for side, image_side in ((20_000, 64), (40_000, 1000), (1 << 31, 1)):
        with pytest.raises(InvalidInputError, match=f"has too large tiles, {side}x{side} pixels"):
            open_image(tiled(side, image_side))
    for side, image_side in ((2048, 64), (4096, 4000)):
        with pytest.raises(InvalidInputError, match="damaged or incomplete"):
            open_image(tiled(side, image_side))


FUZZED = [encoded(Image.fromarray(RGB), name) for name in "PNG JPEG GIF TIFF WEBP BMP TGA ICO PPM".split()]


@pytest.mark.parametrize("data", FUZZED, ids=lambda data: repr(data[:4]))
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_raise_only_our_errors(data):
    rng = random.Random(len(data))
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        try:
            image = open_image(bytes(damaged))
        except InvalidInputError:
            continue
        assert image.mode == "RGB" and max(image.size) <= images.MAX_SIDE
