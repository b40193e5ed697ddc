"""RGB frames to H.264 video files, with PyAV: no system-wide ffmpeg is needed.

A file appears when it is complete. The same frames, rate and metadata give the same bytes, in every process
and on any number of cores.
"""

from __future__ import annotations

import logging
import numbers
import os
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from itertools import chain
from typing import Any, Iterable, Iterator

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from ..errors import InvalidInputError, OutputError, describe
from .files import atomic_file, check_replaceable, local_path
from .sources import reason

logger = logging.getLogger(__name__)

DEFAULT_FPS = 8.0
MIN_FPS, MAX_FPS = 0.01, 1000.0
MAX_SIDE = 8192  # pixels
EXTENSIONS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov"}  # a name without one is an MP4 too

_ENCODER_OPTIONS = {
    "crf": "17",
    # x264's output depends on it, and by default it is the machine's number of cores.
    "threads": "4",
    # x264's AVX-512 code for macroblock trees reads memory that nobody wrote: with trees, the same 448x256
    # frames give other bytes on the next call. Without them, size and quality at a given CRF are much alike.
    "mbtree": "0",
    # The matrix that swscale uses by default. Unsaid, players would assume another from 720 lines on.
    "colorspace": "smpte170m",
    "color_range": "tv",
}
_CONTAINER_OPTIONS = {
    "movflags": "faststart+use_metadata_tags",  # the index first; any metadata key
    "fflags": "+bitexact",  # no library versions
}
# Names that the MP4 writer keeps for itself or takes as instructions.
_RESERVED_KEYS = frozenset(
    ("major_brand", "minor_version", "compatible_brands", "encoder", "creation_time", "timecode")
)


def check_writable(path: Any) -> None:
    """Raise now the OutputError that `write_video` would raise for ``path`` after minutes of computing.

    Looks at the extension, the folder and the file that may be there, and changes nothing.
    """
    _container_format(local_path(path))
    check_replaceable(path)


def write_video(
    frames: np.ndarray | Iterable[np.ndarray],
    path: Any,
    fps: float | Fraction = DEFAULT_FPS,
    metadata: dict[str, str] | None = None,
) -> str:
    """Encode ``frames`` into the file ``path``, created or replaced when complete; returns the path.

    ``frames``: uint8 RGB [F, H, W, 3], or an iterable of frames [H, W, 3] of one size. H.264 (CRF 17,
    yuv420p) in MP4, or QuickTime for ``.mov``. An odd width or height, which yuv420p cannot have, grows by
    one: the last column or row is repeated. ``metadata`` is stored under any keys; see `read_metadata`.

    Raises InvalidInputError for frames, fps or metadata that cannot be used, OutputError for the rest.
    """
    shown = local_path(path)
    container_format = _container_format(shown)
    size, checked = _checked_frames(frames)
    rate, tags = _checked_rate(fps), _checked_metadata(metadata)
    with atomic_file(path) as temporary:
        _encode(checked, size, rate, tags, temporary, container_format, repr(shown))
    return shown


def video_bytes(
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float | Fraction = DEFAULT_FPS,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """The bytes of the MP4 file that `write_video` would write. Same arguments, same errors."""
    size, checked = _checked_frames(frames)
    rate, tags = _checked_rate(fps), _checked_metadata(metadata)
    with ExitStack() as stack:
        # By way of a file: the index can be put first only in what can be read again.
        with _encoder_errors("to memory"):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="i2v-"))
        file = os.path.join(folder, "video.mp4")
        _encode(checked, size, rate, tags, file, "mp4", "to memory")
        with _encoder_errors("to memory"), open(file, "rb") as written:
            return written.read()


def _container_format(shown: str) -> str:
    extension = os.path.splitext(shown)[1].lower()
    if extension and extension not in EXTENSIONS:
        raise OutputError(
            f"cannot write {shown!r}: {extension!r} is not among the extensions allowed, "
            f"{', '.join(EXTENSIONS)}"
        )
    return EXTENSIONS.get(extension, "mp4")


def _checked_frames(
    frames: np.ndarray | Iterable[np.ndarray],
) -> tuple[tuple[int, int], Iterator[np.ndarray]]:
    """(width, height) and the frames, each checked as it is reached."""
    allowed = "allowed are uint8 arrays [F, H, W, 3], or an iterable of [H, W, 3]"
    if isinstance(frames, np.ndarray) and frames.ndim != 4:
        raise InvalidInputError(f"frames is an array of shape {frames.shape}: {allowed}")
    try:
        iterator = iter(frames)
    except TypeError as error:
        raise InvalidInputError(f"frames is a {type(frames).__name__}: {allowed}") from error
    first = next(iterator, None)
    if first is None:
        raise InvalidInputError(f"there are no frames: {allowed}, F at least 1")

    def check(frame: Any, index: int) -> np.ndarray:
        masked = isinstance(frame, np.ma.MaskedArray)
        if masked or not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
            got = frame.dtype if isinstance(frame, np.ndarray) and not masked else type(frame).__name__
            raise InvalidInputError(f"frame {index} is of type {got}: {allowed}")
        sides = frame.shape[:2]
        if frame.ndim != 3 or frame.shape[2] != 3 or min(sides) < 1 or max(sides) > MAX_SIDE:
            raise InvalidInputError(
                f"frame {index} has the shape {frame.shape}: {allowed}, H and W from 1 to {MAX_SIDE}"
            )
        if frame.shape != first.shape:
            raise InvalidInputError(
                f"frame {index} has the shape {frame.shape}, and the first one {first.shape}: all must agree"
            )
        return frame

    check(first, 0)
    checked = (check(frame, index) for index, frame in enumerate(chain([first], iterator)))
    return (first.shape[1], first.shape[0]), checked


def _checked_rate(fps: Any) -> Fraction:
    try:
        if not isinstance(fps, bool) and isinstance(fps, numbers.Real) and MIN_FPS <= float(fps) <= MAX_FPS:
            # 29.97002997... is 30000/1001; a longer fraction would be a rounding error taken at its word.
            return Fraction(fps if isinstance(fps, Fraction) else float(fps)).limit_denominator(1001)
    except Exception:  # numbers that are too large for a float, or not numbers after all
        logger.debug("fps cannot be converted", exc_info=True)
    raise InvalidInputError(f"fps is {describe(fps)}: allowed are numbers from {MIN_FPS:g} to {MAX_FPS:g}")


def _checked_metadata(metadata: Any) -> dict[str, str]:
    """In the order of its keys: the same metadata give the same file."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise InvalidInputError(f"metadata is a {type(metadata).__name__}: a dict of str to str is needed")
    seen: dict[str, str] = {}
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)) or "\0" in key + value or not key:
            raise InvalidInputError(
                f"metadata has {describe(key)}: {describe(value)}; both must be str without null characters, "
                "and the key not empty"
            )
        try:
            (key + value).encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                f"metadata has {describe(key)}, which is not valid Unicode: {error}"
            ) from error
        if key.lower() in _RESERVED_KEYS:
            raise InvalidInputError(f"metadata has the key {key!r}, which the file format keeps for itself")
        if key.lower() in seen:  # ffmpeg would keep one of them
            raise InvalidInputError(
                f"metadata has {seen[key.lower()]!r} and {key!r}: keys must differ in more than case"
            )
        seen[key.lower()] = key
    return dict(sorted(metadata.items()))


def _encode(
    frames: Iterator[np.ndarray],
    size: tuple[int, int],
    rate: Fraction,
    metadata: dict[str, str],
    file: str,
    container_format: str,
    shown: str,
) -> None:
    """Encode into ``file``. What ``frames`` raises passes; all else is an OutputError."""
    width, height = size
    even = (width + width % 2, height + height % 2)
    if even != size:
        logger.info("%dx%d frames become %dx%d: H.264 in yuv420p needs even sizes", *size, *even)
    with _encoder_errors(shown):
        # The path is absolute: whatever characters are in it, ffmpeg sees no protocol there.
        container = av.open(file, "w", format=container_format, container_options=_CONTAINER_OPTIONS)
    try:
        with _encoder_errors(shown):
            container.metadata.update(metadata)
            stream = container.add_stream("libx264", rate=rate, options=dict(_ENCODER_OPTIONS))
            stream.width, stream.height = even
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = 1 / rate
        reformatter = VideoReformatter()
        for index, pixels in enumerate(frames):
            with _encoder_errors(shown):
                frame = _to_yuv(pixels, even, reformatter)
                frame.pts, frame.time_base = index, 1 / rate
                container.mux(stream.encode(frame))
        with _encoder_errors(shown):
            container.mux(stream.encode(None))
            container.close()
    except BaseException:
        with suppress(Exception):  # only to give the file back; the first failure is the one to report
            container.close()
        raise


def _to_yuv(pixels: np.ndarray, size: tuple[int, int], reformatter: VideoReformatter) -> Any:
    """uint8 RGB [H, W, 3] to a yuv420p frame of ``size`` (width, height), which is at most one larger."""
    height, width = pixels.shape[:2]
    if (width, height) != size:
        pixels = np.pad(pixels, ((0, size[1] - height), (0, size[0] - width), (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    # What the ffmpeg program does by default for -pix_fmt yuv420p, to the bit.
    return reformatter.reformat(frame, format="yuv420p", interpolation=Interpolation.BICUBIC)


@contextmanager
def _encoder_errors(shown: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise OutputError(f"cannot write the video {shown}: {reason(error)}") from error
