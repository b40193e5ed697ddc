"""RGB frames to video files, with PyAV: no system-wide ffmpeg is needed.

A file appears when it is complete. The same frames, rate and metadata give the same bytes, in every process
and on any number of cores.
"""

from __future__ import annotations

import logging
import numbers
import os
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from typing import Any, Iterable, Iterator, Mapping

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


@dataclass(frozen=True)
class _Codec:
    """An encoder of ffmpeg's, with what it takes where a caller does not say; ``crf`` None: it has none."""

    encoder: str
    pix_fmt: str = "yuv420p"
    crf: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    tag: str = ""


CODECS = {
    "h264": _Codec(
        "libx264", crf=17,
        # x264's output depends on the threads, and by default they are the machine's number of cores.
        # Its AVX-512 code for macroblock trees reads memory that nobody wrote: with trees, the same 448x256
        # frames give other bytes on the next call. Without them, size and quality at a CRF are much alike.
        options={"threads": "4", "mbtree": "0"},
    ),
    "hevc": _Codec(
        "libx265", crf=20, tag="hvc1",  # without the tag, Apple's players refuse it
        options={"x265-params": "log-level=none:frame-threads=2:pools=4"},
    ),
    "vp9": _Codec("libvpx-vp9", crf=24, options={"b": "0", "threads": "4"}),
    "prores": _Codec("prores_ks", "yuv422p10le"),
}  # fmt: skip
_COLOUR_OPTIONS = {
    # The matrix that swscale uses by default. Unsaid, players would assume another from 720 lines on.
    "colorspace": "smpte170m",
    "color_range": "tv",
}
CONTAINER_OPTIONS = {
    "movflags": "faststart+use_metadata_tags",  # the index first; any metadata key
    "fflags": "+bitexact",  # no library versions
}
# Names that the MP4 writer keeps for itself or takes as instructions.
_RESERVED_KEYS = frozenset(
    ("major_brand", "minor_version", "compatible_brands", "encoder", "creation_time", "timecode")
)


@dataclass(frozen=True)
class Encoding:
    """How frames are coded: a key of ``CODECS``, and ffmpeg's crf and pix_fmt, by default the codec's."""

    codec: str = "h264"
    crf: int | None = None
    pix_fmt: str | None = None

    @property
    def chosen_pix_fmt(self) -> str:
        return self.pix_fmt or CODECS[self.codec].pix_fmt

    @property
    def is_deep(self) -> bool:
        """Whether the file holds more than 8 bits of a colour; frames are then better uint16."""
        try:
            return av.VideoFormat(self.chosen_pix_fmt).components[0].bits > 8
        except ValueError as error:
            raise InvalidInputError(f"pix_fmt: ffmpeg knows no {self.pix_fmt!r}") from error

    def options(self) -> dict[str, str]:
        codec = CODECS[self.codec]
        if codec.crf is None and self.crf is not None:
            raise InvalidInputError(f"crf: got {self.crf}, but {self.codec} has none")
        crf = {} if codec.crf is None else {"crf": str(codec.crf if self.crf is None else self.crf)}
        return {**crf, **codec.options, **_COLOUR_OPTIONS}


def check_writable(path: Any, encoding: Encoding | None = None) -> None:
    """Raise now the OutputError that `write_video` would raise for ``path`` after minutes of computing.

    Looks at the extension, the folder and the file that may be there, and changes nothing. With another
    ``encoding`` than the default, one frame is encoded, in a temporary folder.
    """
    container_format = container_format_of(local_path(path))
    check_replaceable(path)
    if encoding is not None and encoding != Encoding():
        frame = np.zeros((1, 64, 64, 3), np.uint16 if encoding.is_deep else np.uint8)
        try:
            _encoded(frame, DEFAULT_FPS, None, encoding, container_format)
        except OutputError as error:
            raise OutputError(
                f"cannot write {encoding.codec} in {encoding.chosen_pix_fmt} as {container_format}: "
                f"{error.__cause__}; allowed is what ffmpeg's {CODECS[encoding.codec].encoder} and its "
                f"{container_format} files take"
            ) from error


def write_video(
    frames: np.ndarray | Iterable[np.ndarray],
    path: Any,
    fps: float | Fraction = DEFAULT_FPS,
    metadata: dict[str, str] | None = None,
    encoding: Encoding = Encoding(),  # noqa: B008 - it is frozen
) -> str:
    """Encode ``frames`` into the file ``path``, created or replaced when complete; returns the path.

    ``frames``: uint8 RGB [F, H, W, 3], or an iterable of frames [H, W, 3] of one size; uint16 where the
    encoding is deep. By default H.264 (CRF 17, yuv420p) in MP4, or QuickTime for ``.mov``. An odd width or
    height, which yuv420p cannot have, grows by one: the last column or row is repeated. ``metadata`` is
    stored under any keys; see `read_metadata`.

    Raises InvalidInputError for frames, fps or metadata that cannot be used, OutputError for the rest.
    """
    shown = local_path(path)
    container_format = container_format_of(shown)
    size, checked = _checked_frames(frames, encoding)
    rate, tags = checked_rate(fps), checked_metadata(metadata)
    with atomic_file(path) as temporary:
        _encode(checked, size, rate, tags, temporary, encoding, container_format, repr(shown))
    return shown


def video_bytes(
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float | Fraction = DEFAULT_FPS,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """The bytes of the MP4 file that `write_video` would write. Same arguments, same errors."""
    return _encoded(frames, fps, metadata, Encoding(), "mp4")


def _encoded(
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float | Fraction,
    metadata: dict[str, str] | None,
    encoding: Encoding,
    container_format: str,
) -> bytes:
    size, checked = _checked_frames(frames, encoding)
    rate, tags = checked_rate(fps), checked_metadata(metadata)
    with ExitStack() as stack:
        # By way of a file: the index can be put first only in what can be read again.
        with encoder_errors("to memory"):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="i2v-"))
        file = os.path.join(folder, "video.mp4")
        _encode(checked, size, rate, tags, file, encoding, container_format, "to memory")
        with encoder_errors("to memory"), open(file, "rb") as written:
            return written.read()


def container_format_of(shown: str) -> str:
    extension = os.path.splitext(shown)[1].lower()
    if extension and extension not in EXTENSIONS:
        raise OutputError(
            f"cannot write {shown!r}: {extension!r} is not among the extensions allowed, "
            f"{', '.join(EXTENSIONS)}"
        )
    return EXTENSIONS.get(extension, "mp4")


def _checked_frames(
    frames: np.ndarray | Iterable[np.ndarray],
    encoding: Encoding,
) -> tuple[tuple[int, int], Iterator[np.ndarray]]:
    """(width, height) and the frames, each checked as it is reached."""
    types = (np.uint8, np.uint16) if encoding.is_deep else (np.uint8,)
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
        if masked or not isinstance(frame, np.ndarray) or frame.dtype not in types:
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


def checked_rate(fps: Any) -> Fraction:
    try:
        if not isinstance(fps, bool) and isinstance(fps, numbers.Real) and MIN_FPS <= float(fps) <= MAX_FPS:
            # 29.97002997... is 30000/1001; a longer fraction would be a rounding error taken at its word.
            return Fraction(fps if isinstance(fps, Fraction) else float(fps)).limit_denominator(1001)
    except Exception:  # numbers that are too large for a float, or not numbers after all
        logger.debug("fps cannot be converted", exc_info=True)
    raise InvalidInputError(f"fps is {describe(fps)}: allowed are numbers from {MIN_FPS:g} to {MAX_FPS:g}")


def checked_metadata(metadata: Any) -> dict[str, str]:
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
    encoding: Encoding,
    container_format: str,
    shown: str,
) -> None:
    """Encode into ``file``. What ``frames`` raises passes; all else is an OutputError."""
    width, height = size
    even = (width + width % 2, height + height % 2)
    if even != size:
        logger.info("%dx%d frames become %dx%d: video files need even sizes", *size, *even)
    codec, pix_fmt = CODECS[encoding.codec], encoding.chosen_pix_fmt
    with encoder_errors(shown):
        # The path is absolute: whatever characters are in it, ffmpeg sees no protocol there.
        container = av.open(file, "w", format=container_format, container_options=CONTAINER_OPTIONS)
    try:
        with encoder_errors(shown):
            container.metadata.update(metadata)
            stream = container.add_stream(codec.encoder, rate=rate, options=encoding.options())
            stream.width, stream.height = even
            stream.pix_fmt = pix_fmt
            if codec.tag:
                stream.codec_context.codec_tag = codec.tag
            stream.codec_context.time_base = 1 / rate
        reformatter = VideoReformatter()
        for index, pixels in enumerate(frames):
            with encoder_errors(shown):
                frame = _to_yuv(pixels, even, pix_fmt, reformatter)
                frame.pts, frame.time_base = index, 1 / rate
                container.mux(stream.encode(frame))
        with encoder_errors(shown):
            container.mux(stream.encode(None))
            container.close()
    except BaseException:
        with suppress(Exception):  # only to give the file back; the first failure is the one to report
            container.close()
        raise


def _to_yuv(pixels: np.ndarray, size: tuple[int, int], pix_fmt: str, reformatter: VideoReformatter) -> Any:
    """RGB [H, W, 3] to a frame of a format and ``size`` (width, height), which is at most one larger."""
    height, width = pixels.shape[:2]
    if (width, height) != size:
        pixels = np.pad(pixels, ((0, size[1] - height), (0, size[0] - width), (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(
        np.ascontiguousarray(pixels), format="rgb24" if pixels.dtype == np.uint8 else "rgb48le"
    )
    # What the ffmpeg program does by default for -pix_fmt yuv420p, to the bit.
    return reformatter.reformat(frame, format=pix_fmt, interpolation=Interpolation.BICUBIC)


@contextmanager
def encoder_errors(shown: str) -> Iterator[None]:
    """Turn whatever an encoder or a file system raises into an OutputError."""
    try:
        yield
    except (InvalidInputError, OutputError):
        raise
    except Exception as error:
        raise OutputError(f"cannot write the video {shown}: {reason(error)}") from error
