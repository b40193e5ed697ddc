"""Random bytes, with and without the beginning of a real file, through every reader: only our own errors."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any, Callable

import pytest
from PIL import Image

from modelscope_i2v.errors import CheckpointError, ConfigurationError, InvalidInputError
from modelscope_i2v.media.images import open_image
from modelscope_i2v.media.video import read_metadata, read_video
from modelscope_i2v.settings.configuration import load_settings
from modelscope_i2v.weights import open_checkpoint

TRIALS = 300  # for each reader, half of them behind one of its formats' beginnings

BEGINNINGS = {
    "image": [
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xd8\xff\xe0\0\x10JFIF", b"GIF89a", b"BM", b"II*\0",
        b"MM\0*", b"RIFF\xff\0\0\0WEBPVP8 ", b"RIFF\xff\0\0\0WEBPVP8L", b"P6\n9 9\n255\n", b"\0\0\1\0\1\0",
        b"8BPS\0\1", b"\0\0\0\x0cjP  \r\n\x87\n", b"DDS |\0\0\0", b"qoif", b"\0\0\0\x20ftypavif",
        b"/* XPM */", b"%!PS-Adobe",
    ],
    "video": [
        b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", b"\0\0\0\x08moov", b"\x1aE\xdf\xa3\x9fB\x86\x81\x01",
        b"RIFF\xff\0\0\0AVI LIST", b"GIF89a", b"FLV\1\5\0\0\0\x09\0\0\0\0", b"OggS\0\2", b"\0\0\1\xba",
        b"\0\0\1\xb3", b"\0\0\0\1\x67\x42\0\x1e", b"G@\0\x10\0\0\xb0\r", b"DKIF\0\0 \0VP80",
        b"YUV4MPEG2 W9 H9 F8:1\nFRAME\n", b"0&\xb2u\x8ef\xcf\x11\xa6\xd9\0\xaa\0b\xcel",
        b"nut/multimedia container\0", b"#EXTM3U\n", b"ffconcat",
    ],
    "checkpoint": [
        b"PK\x03\x04", b"\x80\x02",
        b"\x80\x04\x95", struct.pack("<Q", 40) + b'{"a":{"dtype":"F32","shape":[', b"\x1f\x8b\x08",
        b"version https://git-lfs", b"<html>",
    ],
    "configuration": [
        b"{", b'{"task": "image-to-video", "model": {', b"\xef\xbb\xbf{", b"\xff\xfe{", b"//", b"---\n",
    ],
}  # fmt: skip

READERS: dict[str, tuple[str, Callable[[Path], Any], type[Exception]]] = {
    "image": ("image", open_image, InvalidInputError),
    "image, as bytes": ("image", lambda path: open_image(path.read_bytes()), InvalidInputError),
    "video": ("video", lambda path: read_video(path, max_frames=20), InvalidInputError),
    "video, its metadata": ("video", read_metadata, InvalidInputError),
    "checkpoint": ("checkpoint", lambda path: open_checkpoint(path).close(), CheckpointError),
    "configuration": (
        "configuration",
        lambda path: load_settings(path.parent, "image-to-video"),
        ConfigurationError,
    ),
}


@pytest.mark.filterwarnings("ignore")  # Pillow's, of strange images
@pytest.mark.parametrize("reader", READERS)
def test_random_bytes(tmp_path, reader, monkeypatch):
    kind, read, error = READERS[reader]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # a header may announce anything: not for long
    draw, path, refused = random.Random(reader), tmp_path / "configuration.json", 0
    for trial in range(TRIALS):
        data = draw.randbytes(draw.choice((1, 2, 7, 64, 500, 5000)))
        if trial % 2:
            data = draw.choice(BEGINNINGS[kind]) + data
        path.write_bytes(data)
        try:
            read(path)
        except error as refusal:
            refused += 1
            assert str(refusal) and len(str(refusal)) < 2000
    # A few random images do decode: five bytes are a raw H.264 stream or a PPM picture, as far as they go.
    assert refused > 0.8 * TRIALS
