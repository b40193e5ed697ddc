"""Images in whatever form a caller has them, as 8-bit RGB Pillow images.

What comes out equals what ModelScope's own ``LoadImage`` gives, with three differences: 16-bit images are
scaled to 8 bits, not clipped; arrays with one or four channels are understood; and whatever cannot be
used is an InvalidInputError (MissingFileError if the file is not there), whatever the input. What a file may
take of memory and time is checked on its header, before any pixel is decoded.
"""

from __future__ import annotations

import io
import logging
import os
import re
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import InvalidInputError
from .sources import describe_content, input_errors, read_source, reason, source_name

logger = logging.getLogger(__name__)

MAX_SIDE = 20_000  # pixels
MAX_PIXELS = 178_000_000  # just below Pillow's own limit, so that ours is the one met
MAX_BYTES = 1 << 30  # of a file

# Left out on purpose: EPS and WMF, whose readers start other programs, and the formats for which Pillow
# has only a stub. Those that an installation lacks are skipped.
FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "JXL", "PPM",
    "TGA", "ICO", "ICNS", "PCX", "PSD", "SGI", "DDS", "QOI", "XBM", "XPM", "IM", "MSP", "SPIDER",
)  # fmt: skip

# Decoding takes as long as the scans are many, whatever their size: encoders make 10 or so.
MAX_SCANS = 100  # of a progressive JPEG
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # not those that stand alone within a scan
_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"

# A tile is decoded whole: it may be so much larger than an image that it holds a corner of.
_MAX_TILE_PIXELS = 1 << 22
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF's tags


def open_image(source: Any) -> Image.Image:
    """The image as a new 8-bit RGB Pillow image of 1x1 to MAX_SIDE x MAX_SIDE, MAX_PIXELS in all.

    ``source`` is one of

    - a path, a URL or the bytes of a file: the EXIF orientation is applied; of an animation, the first
      frame;
    - a Pillow image, never modified: its pixels as they are, its EXIF orientation ignored (ModelScope does
      so, and code that rotates an image by hand often leaves the old tag on it);
    - an array in OpenCV's order: [H, W, 3] BGR, [H, W, 4] BGRA, [H, W] or [H, W, 1] grey; uint8, uint16
      (0 to 65535) or float (0 to 1).

    Alpha is dropped, not blended: colours stored under transparent pixels show, as in ModelScope.
    Raises InvalidInputError, MissingFileError or NotEnoughMemoryError, nothing else (but MissingPackageError
    for a URL when requests is not installed).
    """
    with input_errors("image", source):
        if isinstance(source, Image.Image):
            return _to_rgb(source, f"(from Pillow, mode {source.mode}, {source.width}x{source.height})")
        if isinstance(source, np.ndarray):
            return _from_array(source)
        if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
            return _from_file(read_source(source, "image", MAX_BYTES), source_name(source))
        raise InvalidInputError(
            f"cannot use a {type(source).__name__} as an image: give a path, a URL, bytes, a Pillow image or "
            "a NumPy array"
        )


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise InvalidInputError(f"the image {name} has no pixels: {width}x{height}")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise InvalidInputError(
            f"the image {name} is too large: {width}x{height}; allowed are {MAX_SIDE:,} pixels a side and "
            f"{MAX_PIXELS:,} in all"
        )


def _from_file(data: bytes, name: str) -> Image.Image:
    Image.init()  # registers the formats of all installed plugins; does nothing the second time
    try:
        # The header only. Pillow may warn here of more than 89 million pixels: it is a global setting of
        # Pillow's that the caller owns, so it is left alone.
        image = Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidInputError(
            f"the image {name} is too large: allowed are {MAX_SIDE:,} pixels a side and {MAX_PIXELS:,} in "
            f"all; Pillow says: {error}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        raise InvalidInputError(
            f"the image {name} cannot be read: it seems to be {describe_content(data[:512])}, damaged or of "
            "a kind that is not supported"
        ) from error
    with image:
        _check_size(image.width, image.height, name)
        _check_scans(data, name)
        _check_tiles(image, name)
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:
            raise InvalidInputError(
                f"the image {name} ({image.format}) is damaged or incomplete: {reason(error)}"
            ) from error
        if image.format != "TIFF":  # Pillow turns these itself; its version 10.0 would turn them again
            try:
                ImageOps.exif_transpose(image, in_place=True)
            except Exception:  # a broken EXIF block is no reason to refuse good pixels
                logger.debug("the image's EXIF block cannot be read", exc_info=True)
        return _to_rgb(image, name)


def _check_scans(data: bytes, name: str) -> None:
    """Refuse a JPEG of many scans: see MAX_SCANS. What is no JPEG passes."""
    if not data.startswith(b"\xff\xd8"):
        return
    scans, end = 0, 2
    while (marker := _JPEG_MARKER.search(data, end)) and marker[1] != _END_OF_IMAGE:
        # Behind the marker is the length of its segment, in which bytes may look like markers.
        end = marker.end() + max(int.from_bytes(data[marker.end() : marker.end() + 2], "big"), 2)
        scans += marker[1] == _START_OF_SCAN
        if scans > MAX_SCANS:
            raise InvalidInputError(f"the image {name} has more than the {MAX_SCANS} scans allowed in a JPEG")


def _check_tiles(image: Image.Image, name: str) -> None:
    """Refuse a TIFF whose tiles, which are decoded whole, are far larger than the image that they make."""
    tags = getattr(image, "tag_v2", {})
    width, height = (int(tags.get(tag, 0)) for tag in (_TILE_WIDTH, _TILE_LENGTH))
    if width * height > _MAX_TILE_PIXELS + 4 * image.width * image.height:
        raise InvalidInputError(
            f"the image {name} of {image.width}x{image.height} has too large tiles, {width}x{height} pixels"
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A new RGB image from any Pillow mode."""
    _check_size(image.width, image.height, name)
    if image.mode.startswith("I;16"):
        return Image.fromarray(_from_16_bits(np.asarray(image))).convert("RGB")
    if image.mode == "I":
        return _integers_to_rgb(image, name)
    if image.mode == "F":
        return _floats_to_rgb(image, name)
    if image.mode in ("RGBa", "La"):  # Pillow undoes premultiplied alpha only towards the same with alpha
        image = image.convert(image.mode.replace("a", "A"))
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; straight to RGB Pillow would warn
    rgb = image.convert("RGB")
    # Nothing of the source's notes may travel on: its orientation has been dealt with.
    rgb.info = {}
    return rgb


def _integers_to_rgb(image: Image.Image, name: str) -> Image.Image:
    # Older Pillow opens 16-bit greyscale files in this mode. An image made in memory says nothing of its
    # range, and Pillow's own convention for it is 0 to 255.
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise InvalidInputError(
            f"the image {name} has 32-bit values from {low} to {high}: allowed are 0 to 65535"
        )
    if image.format is None and high <= 255:
        return image.convert("RGB")
    return Image.fromarray(_from_16_bits(values)).convert("RGB")


def _floats_to_rgb(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # so written, NaN is refused too
        raise InvalidInputError(
            f"the image {name} has floating-point values from {low:g} to {high:g}: "
            "allowed are 0 to 1 and 0 to 255"
        )
    if high > 1:
        return image.convert("RGB")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    """0..65535 to uint8, 65535 being 255, to the nearest."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_array(array: np.ndarray) -> Image.Image:
    name = f"(an array, {array.dtype}, shape {array.shape})"
    if isinstance(array, np.ma.MaskedArray):
        raise InvalidInputError(f"the image {name} is a masked array: fill it, as with array.filled(0)")
    allowed = "allowed are [H, W, 3] BGR, [H, W, 4] BGRA and [H, W] grey"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise InvalidInputError(f"the image {name} has an unknown layout: {allowed}")
    _check_size(array.shape[1], array.shape[0], name)
    pixels = _array_to_8_bits(array, name)
    if pixels.ndim == 3:
        pixels = pixels[:, :, 2::-1]  # BGR(A) to RGB
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def _array_to_8_bits(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 values, from uint8, from uint16 that uses more than 8 bits, or from floats in [0, 1]."""
    if array.dtype == np.uint8:
        return array
    ranges = "allowed are uint8, uint16 from 0 to 65535 and floats from 0 to 1; convert it to uint8"
    if array.dtype.kind != "f" and array.dtype.newbyteorder("=") != np.uint16:
        raise InvalidInputError(f"the image {name} has values of type {array.dtype}: {ranges}")
    low, high = array.min(), array.max()
    if array.dtype.kind == "u":
        if 0 < high <= 255:
            raise InvalidInputError(
                f"the image {name} has values up to {high} only: 8-bit values and a dark 16-bit image look "
                f"alike; {ranges}"
            )
        return _from_16_bits(array)
    if not (low >= 0 and high <= 1):  # so written, NaN is refused too
        raise InvalidInputError(f"the image {name} has values from {low:g} to {high:g}: {ranges}")
    return np.rint(array * 255).astype(np.uint8)
