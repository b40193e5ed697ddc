"""Video files to RGB frames, with PyAV: no system-wide ffmpeg is needed.

A name inside a file (playlists and their kin) is never followed, and what is decoded is bounded in memory:
`open_video` holds one frame at a time, `read_video` as many as MAX_DECODED_BYTES allow.
"""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Iterator

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from ..errors import InvalidInputError, describe
from .sources import describe_content, input_errors, open_source, reason, source_name

logger = logging.getLogger(__name__)

ASSUMED_FPS = 8.0  # where a file does not tell
MAX_FPS = 1000.0
MAX_SIDE = 8192  # pixels
MAX_DECODED_BYTES = 4 << 30  # of RGB frames held at once: some 1,500 of 1280x720
MAX_BYTES = 2 << 30  # of a download or of bytes given; a local file is read piece by piece

# All of them self-contained: none can refer to another file or address.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "gif", "apng", "mpegts", "mpeg", "mpegvideo", "h264",
    "hevc", "m4v", "flv", "ogg", "asf", "ivf", "yuv4mpegpipe", "nut", "mxf", "dv",
)  # fmt: skip
_MAX_FAILURES = 100  # packets in a row that do not decode, before the rest of a damaged file is given up
_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC: a recording's cover, which is no video
# PyAV 19 dropped the option: it always keeps what is not UTF-8 as lone surrogates.
_METADATA_OPTIONS: dict[str, Any] = {}
if int(av.__version__.split(".")[0]) < 19:
    _METADATA_OPTIONS["metadata_errors"] = "surrogateescape"
_BRANDS = ("major_brand", "minor_version", "compatible_brands")  # MP4's own, not the author's
# Frames' and swscale's numbers for BT.709, FCC, SMPTE 240M and BT.2020 are the same (PyAV 14 has no name for
# the last); all else is taken as BT.601, as ffmpeg does.
_SHARED_COLORSPACES = (1, 4, 7, 9)
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # ffmpeg's AVCOL_TRC_SMPTE2084 and _ARIB_STD_B67


@dataclass(frozen=True)
class Timing:
    """When a video's frames are shown: frame i at ``stamps[i] * unit`` seconds.

    Without stamps the rate is constant: i * unit.
    """

    unit: Fraction
    stamps: tuple[int, ...] | None = None

    def ticks(self, index: int) -> int:
        """Return when a frame is shown, in units; before the first and after the last, at their rate."""
        if self.stamps is None:
            return index
        last = len(self.stamps) - 1
        step = max((self.stamps[last] - self.stamps[0]) // max(last, 1), 1)
        inside = min(max(index, 0), last)
        return self.stamps[inside] + (index - inside) * step

    def seconds(self, index: int) -> Fraction:
        return self.ticks(index) * self.unit

    @property
    def rate(self) -> Fraction:
        """Frames per second; their average, where it varies."""
        if self.stamps is None or len(self.stamps) < 2:
            return 1 / self.unit
        return (len(self.stamps) - 1) / (self.seconds(len(self.stamps) - 1) - self.seconds(0))


@dataclass(frozen=True, eq=False)
class Video:
    """A decoded video: ``frames`` uint8 RGB [F, H, W, 3], F >= 1; ``fps`` in Hz; the file's ``metadata``."""

    frames: np.ndarray
    fps: float
    metadata: dict[str, str] = field(default_factory=dict)


class VideoReader:
    """The frames of an open video: iterate once for uint8 RGB arrays [H, W, 3] of one size, in order.

    Attributes:
        size: (width, height) of the frames in pixels, as shown.
        fps: frames per second, by the file's header; once all are read, by their times where these differ.
        metadata: the file's.
        start: when the first frame is shown, in seconds of the file's time.
        has_alpha: whether the frames are transparent somewhere, perhaps; what comes is without it.
        transfer: how the file's numbers become light, if not as in ordinary video: ``PQ`` or ``HLG``.
    """

    def __init__(self, container: Any, source: Any, max_frames: int | None):
        self._container, self._source, self._max_frames = container, source, max_frames
        self._name = source_name(source)
        self._stream = _video_stream(container, self._name)
        self.metadata = _metadata(container)
        self.fps = _frame_rate(self._stream, 0.0) or ASSUMED_FPS
        self.has_alpha, self.transfer = False, ""
        self._times: list[int] = []
        self._time_base, self._all_timed = Fraction(self._stream.time_base or 1), True
        self._frames = self._read()
        first = next(self._frames, None)
        if first is None:
            raise InvalidInputError(f"the video {self._name} has no frame that can be decoded")
        self._first: np.ndarray | None = first
        self.size = (first.shape[1], first.shape[0])

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._first is not None:
            first, self._first = self._first, None
            yield first
        yield from self._frames

    @property
    def rate(self) -> Fraction | None:
        """Frames per second as the file states it, None where it states none that can be."""
        stated = (self._stream.average_rate, self._stream.guessed_rate)
        return next((rate for rate in stated if _plausible(rate)), None)

    @property
    def start(self) -> Fraction:
        return self._times[0] * self._time_base if self._times else Fraction(0)

    def timing(self) -> Timing:
        """Return when the frames read so far are shown, the first at 0.

        The rate is constant, and exact, where the frames' times are that rate's as the file can tell them.
        """
        count, base = len(self._times), self._time_base
        stated = [rate for rate in (self._stream.average_rate, self._stream.guessed_rate) if _plausible(rate)]
        stamps = tuple(time - self._times[0] for time in self._times)
        known = self._all_timed and all(b > a for a, b in zip(stamps, stamps[1:]))
        if not known or count < 2:
            return Timing(1 / Fraction(*(stated or [self.fps])[0].as_integer_ratio()).limit_denominator(1001))
        measured = ((count - 1) / (stamps[-1] * base)).limit_denominator(1001)
        error = max(base, Fraction(1, 1000))  # of times, in files that tell them in milliseconds
        for rate in [*stated, measured] if measured else stated:
            if all(abs(stamp * base - index / rate) <= error for index, stamp in enumerate(stamps)):
                return Timing(1 / Fraction(rate))
        return Timing(base, stamps)

    def _read(self) -> Iterator[np.ndarray]:
        with input_errors("video", self._source):
            yield from self._checked_frames()

    def _checked_frames(self) -> Iterator[np.ndarray]:
        stream, name, reformatter = self._stream, self._name, VideoReformatter()
        size, orientation = None, (False, False, False)
        count, resized, times = 0, False, self._times
        for frame in _decode(self._container, stream, name):
            if count == self._max_frames:
                logger.info("the video %s has more frames; the first %d were read", name, count)
                break
            if size is None:
                size, orientation = (frame.width, frame.height), _orientation(frame)
                _check_side(*size, name)
                self.has_alpha = any(part.is_alpha for part in frame.format.components)
                self.transfer = _HDR_TRANSFERS.get(int(getattr(frame, "color_trc", 0) or 0), "")
            elif size != (frame.width, frame.height) and not resized:
                resized = True
                logger.warning(
                    "the video %s changes its size to %dx%d at frame %d; all are resized to %dx%d",
                    name, frame.width, frame.height, count, *size,
                )  # fmt: skip
            if frame.pts is not None and stream.time_base:
                times.append(frame.pts)  # the last frames out of a decoder lack their time base
            else:
                self._all_timed = False
            count += 1
            yield _orient(_to_rgb(frame, reformatter, size), orientation)
        else:
            if 0 < count < stream.frames:
                logger.warning("the video %s announces %d frames; %d decoded", name, stream.frames, count)
        span = (times[-1] - times[0]) * self._time_base if times else 0
        rate = _frame_rate(stream, float((len(times) - 1) / span) if span > 0 else 0.0)
        if rate is None and count:
            logger.info("the video %s does not tell its frame rate; taken as %g", name, ASSUMED_FPS)
        self.fps = rate or ASSUMED_FPS


@contextmanager
def open_video(source: Any, max_frames: int | None = None) -> Iterator[VideoReader]:
    """Open a video, from a path, a URL or the bytes of a file, to be decoded frame by frame.

    Every frame comes once, in presentation order, at most the first ``max_frames``. The file's rotation or
    mirroring is applied; alpha is dropped, as for images; non-square pixels are not stretched; frames of
    another size than the first are resized to it. A file that is damaged or cut short gives the frames that
    decode, and a logged warning. Where no rate is known ASSUMED_FPS is taken, and logged.

    Raises MissingFileError; InvalidInputError if no frame can be had or a side exceeds MAX_SIDE; and, at any
    frame, NotEnoughMemoryError.
    """
    if max_frames is not None and (not isinstance(max_frames, (int, np.integer)) or max_frames < 1):
        raise InvalidInputError(
            f"max_frames is {describe(max_frames)}: allowed are whole numbers from 1, and None"
        )
    with open_container(source) as container:
        with input_errors("video", source):
            reader = VideoReader(container, source, max_frames)
        yield reader


def read_video(source: Any, max_frames: int | None = None) -> Video:
    """Decode a video as `open_video` does, all frames at once; ``fps`` is the average of a variable rate.

    Raises what `open_video` does, and InvalidInputError if all frames together exceed MAX_DECODED_BYTES.
    """
    frames: list[np.ndarray] = []
    with open_video(source, max_frames) as reader, input_errors("video", source):
        width, height = reader.size
        for frame in reader:
            if 3 * width * height * (len(frames) + 1) > MAX_DECODED_BYTES:
                raise InvalidInputError(
                    f"the video {source_name(source)} is too long: with frame {len(frames) + 1} its "
                    f"{width}x{height} frames exceed {MAX_DECODED_BYTES:,} bytes; read fewer with max_frames"
                )
            frames.append(frame)
        return Video(_stack(frames), reader.fps, reader.metadata)


def read_metadata(source: Any) -> dict[str, str]:
    """The metadata of a video file, such as `write_video` stores. Sources and errors as for `read_video`."""
    with open_container(source) as container, input_errors("video", source):
        return _metadata(container)


class _Nameless:
    """The three methods that PyAV needs, and no ``name``, from which ffmpeg would draw conclusions."""

    def __init__(self, file: Any):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _refuse_nested(url: str, flags: int, options: dict[str, str]) -> Any:
    raise PermissionError("the file refers to another one")


@contextmanager
def open_container(source: Any) -> Iterator[Any]:
    with open_source(source, "video", MAX_BYTES) as file:
        head = file.read(512)
        file.seek(0)
        # Not the argument `options`: with it PyAV 14 crashes on formats whose header names no streams.
        options = {"format_whitelist": ",".join(_FORMATS), "protocol_whitelist": "none"}
        try:
            container = av.open(
                _Nameless(file),
                "r",
                container_options=options,
                io_open=_refuse_nested,
                **_METADATA_OPTIONS,
            )
        except Exception as error:
            raise InvalidInputError(
                f"the video {source_name(source)} cannot be read: it seems to be {describe_content(head)}, "
                f"damaged or of a kind that is not supported ({reason(error)})"
            ) from error
        try:
            yield container
        finally:
            container.close()


def _metadata(container: Any) -> dict[str, str]:
    entries = {_as_unicode(key): _as_unicode(value) for key, value in container.metadata.items()}
    return {key: value for key, value in entries.items() if key not in _BRANDS}


def _as_unicode(text: str) -> str:
    """With what was not UTF-8 in the file replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _video_stream(container: Any, name: str) -> Any:
    streams = [s for s in container.streams.video if not _disposition(s) & _ATTACHED_PICTURE]
    if not streams:
        # Not by each stream's own type: asking an unknown one for it crashes PyAV 14.
        kinds = [kind for kind in ("audio", "subtitles", "data") if getattr(container.streams, kind)]
        others = ", ".join(kinds) or "nothing"
        raise InvalidInputError(f"the video {name} has no video stream (it has: {others})")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise InvalidInputError(f"the video {name} is of a codec that is not supported")
    _check_side(stream.codec_context.width, stream.codec_context.height, name)
    stream.codec_context.options = {"max_pixels": str(MAX_SIDE * MAX_SIDE)}  # for a size that grows later
    stream.thread_type = "AUTO"
    return stream


def _disposition(stream: Any) -> int:
    flags = getattr(stream, "disposition", 0) or 0  # PyAV 14 does not tell
    return int(getattr(flags, "value", flags))  # PyAV 15 to 17.0 have an enumeration that is no number


def _check_side(width: int, height: int, name: str) -> None:
    if max(width, height) > MAX_SIDE:
        raise InvalidInputError(
            f"the video {name} is too large: {width}x{height}; allowed are {MAX_SIDE:,} pixels a side"
        )


def _decode(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """All frames that decode. What does not is skipped, with one warning in the end."""
    failures = in_a_row = 0
    last: Exception = EOFError()
    packets = container.demux(stream)
    packet: Any = stream  # anything but None
    while packet is not None and in_a_row < _MAX_FAILURES:
        frames = []
        try:
            packet = None  # also after a failure to read on: the decoder still holds some frames
            packet = next(packets, None)
            if packet is not None and not packet.size:
                continue  # "the last frame again" in AVI and Theora; PyAV's own sign of the end
        except MemoryError:
            raise
        except av.error.FFmpegError as error:
            failures, last = failures + 1, error
        try:
            frames = stream.decode(packet)
            in_a_row = 0
        except av.error.EOFError:  # already emptied
            pass
        except MemoryError:
            raise
        except av.error.FFmpegError as error:
            failures, in_a_row, last = failures + 1, in_a_row + 1, error
        yield from frames
    if failures:
        words = reason(last)
        logger.warning("the video %s is damaged: %d packets did not decode (%s)", name, failures, words)


def _to_rgb(frame: Any, reformatter: VideoReformatter, size: tuple[int, int]) -> np.ndarray:
    """The frame's stored pixels as uint8 RGB [height, width, 3]."""
    source = int(frame.colorspace)
    rgb = reformatter.reformat(
        frame,
        width=size[0],
        height=size[1],
        format="rgb24",
        interpolation=Interpolation.BICUBIC,
        # Said outright because PyAV's defaults changed: before 17 they ignored the frame's own matrix.
        src_colorspace=source if source in _SHARED_COLORSPACES else Colorspace.ITU601,
        dst_colorspace=Colorspace.DEFAULT,
        src_color_range=frame.color_range,
        dst_color_range=ColorRange.JPEG,
    )
    return rgb.to_ndarray()


def _orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Whether to swap the axes, then to mirror left-right, then top-bottom: the frame's display matrix.

    PyAV's ``frame.rotation`` would not do: it is without the mirroring of a phone's front camera.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return False, False, False
    # x' = a x + c y, y' = b x + d y, in rows of three: (a, b, .), (c, d, .), ...
    a, b, _, c, d = (int(v) for v in np.frombuffer(bytes(side_data), np.int32, 5))
    if abs(b) > abs(a):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def _orient(pixels: np.ndarray, orientation: tuple[bool, bool, bool]) -> np.ndarray:
    swap, mirror, flip = orientation
    if swap:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if flip else 1, :: -1 if mirror else 1]


def _frame_rate(stream: Any, measured: float) -> float | None:
    """Frames per second: the file's own average, unless the rate by the frames' times, if known, differs."""
    for rate in (stream.average_rate, stream.guessed_rate):
        # Times are often rounded to milliseconds: the stated rate is the better one if they agree.
        if _plausible(rate) and (not measured or math.isclose(float(rate), measured, rel_tol=0.05)):
            return float(rate)
    return measured if _plausible(measured) else None


def _plausible(rate: Any) -> bool:
    return bool(rate) and 0 < rate <= MAX_FPS


def _stack(frames: list[np.ndarray]) -> np.ndarray:
    """One array [F, H, W, 3]; empties the list as it goes, so that nothing is held twice for long."""
    stacked = np.empty((len(frames), *frames[0].shape), np.uint8)
    for index in range(len(frames)):
        stacked[index] = frames[index]
        frames[index] = None  # type: ignore[call-overload]
    return stacked
