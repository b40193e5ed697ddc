"""Videos for the tests: a moving pattern, and files as other programs write them."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np


def moving_frames(count: int = 10, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth pattern in motion, each frame with its number as brightness of the left edge."""
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack([127 + 100 * np.sin((x + 3 * t) / 11), 127 + 100 * np.cos((y - 2 * t) / 9), 0 * x + 90], -1)
        for t in range(count)
    ]
    frames = np.stack(frames).astype(np.uint8)
    frames[:, :, :8] = (20 * np.arange(count) % 256).astype(np.uint8)[:, None, None, None]
    return frames


FRAMES = moving_frames()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def foreign_file(
    frames, codec="ffv1", pix_fmt="bgr0", container="matroska", fps=8, times=None, source="rgb24", **options
) -> bytes:
    """A file made with PyAV alone: other codecs, containers and times than ours."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000) if times else Fraction(1, fps)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source).reformat(
                format=pix_fmt
            )
            frame.pts = times[index] if times else index
            frame.time_base = stream.codec_context.time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def with_display_matrix(mp4: bytes, a: int, b: int, c: int, d: int) -> bytes:
    data = bytearray(mp4)
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", *(65536 * v for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    return bytes(data)
