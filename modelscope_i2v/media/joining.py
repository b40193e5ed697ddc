"""Parts of a video, its frames' times and a source's sound, put together into one file without re-encoding.

The parts are files of `write_video`, one after the other. Sound is copied as it is where the file's format
takes its codec, and is else encoded as AAC; it is cut to the pictures, and keeps its place beside them.
"""

from __future__ import annotations

import heapq
import logging
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Callable, Iterator, Sequence

import av

from .files import atomic_file, local_path
from .sources import reason, source_name
from .video_reading import Timing, open_container
from .video_writing import CONTAINER_OPTIONS, checked_metadata, container_format_of, encoder_errors

logger = logging.getLogger(__name__)

#: What players of MP4 files know; its writer takes more, such as PCM, which few of them play.
_PLAYED = {"aac", "mp3", "ac3", "eac3", "alac", "flac", "opus"}
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)


@dataclass(frozen=True)
class Sound:
    """Sound of a source: what sounds at ``start`` seconds of its time comes with the first frame."""

    source: Any
    start: Fraction = Fraction(0)


@dataclass(frozen=True)
class Part:
    """A file of frames, as `write_video` writes it at a ``rate``."""

    path: str
    frames: int
    rate: Fraction


def join_video(
    parts: Sequence[Part],
    path: Any,
    timing: Timing,
    metadata: dict[str, str] | None = None,
    sound: Sound | None = None,
) -> str:
    """Write one video file of parts, at least one, created or replaced when it is complete; returns the path.

    Args:
        parts: of one encoding and size, in their order.
        path: as of `write_video`.
        timing: when the frames of all parts are shown.
        metadata: as of `write_video`.
        sound: what to hear with it. A source without sound is silent.

    Raises:
        OutputError: if the file cannot be written.
        InvalidInputError, MissingFileError: if the sound's source cannot be read.
    """
    shown, tags = local_path(path), checked_metadata(metadata)
    with atomic_file(path) as temporary, ExitStack() as stack:
        with encoder_errors(repr(shown)):
            container = av.open(
                temporary, "w", format=container_format_of(shown), container_options=CONTAINER_OPTIONS
            )
            container.metadata.update(tags)
        try:
            frames = sum(part.frames for part in parts)
            first = stack.enter_context(av.open(parts[0].path))
            video = _copied_stream(container, first.streams.video[0])
            video.time_base = timing.unit
            tracks: list[Iterator[_Timed]] = []
            if sound is not None:
                source = stack.enter_context(open_container(sound.source))
                end = timing.seconds(frames)
                tracks = _sound(source, container, sound.start, end, source_name(sound.source))
            with encoder_errors(repr(shown)):
                # In the order of their times: else the writer would keep what it cannot write yet.
                for _, _, packet in heapq.merge(_pictures(parts, video, timing), *tracks):
                    container.mux(packet)
                container.close()
        except BaseException:
            with suppress(Exception):  # only to give the file back; the first failure is the one to report
                container.close()
            raise
    return shown


#: (seconds, number of the packet, packet): the number keeps packets of one time from being compared.
_Timed = tuple[Fraction, int, Any]


def _copied_stream(container: Any, template: Any) -> Any:
    """Add a stream that takes another's packets."""
    if hasattr(container, "add_stream_from_template"):
        return container.add_stream_from_template(template)
    return container.add_stream(template=template)  # PyAV 13


def _pictures(parts: Sequence[Part], video: Any, timing: Timing) -> Iterator[_Timed]:
    """Yield the parts' packets with the times of their frames."""
    # Frames are decoded as many places before they are shown as the part of the most needs.
    ahead = max(_packets_ahead(part) for part in parts)
    first = decoded = 0
    for part in parts:
        for packet in _packets(part):
            shown = first + _frame_number(packet.pts, packet, part)
            packet.stream, packet.time_base = video, timing.unit
            packet.pts, packet.dts = timing.ticks(shown), timing.ticks(decoded - ahead)
            packet.duration = timing.ticks(shown + 1) - packet.pts
            yield timing.seconds(decoded - ahead), -1, packet
            decoded += 1
        first += part.frames


def _packets(part: Part) -> Iterator[Any]:
    with av.open(part.path) as container:
        yield from (each for each in container.demux(container.streams.video[0]) if each.dts is not None)


def _packets_ahead(part: Part) -> int:
    packet = next(_packets(part))
    return _frame_number(packet.pts, packet, part) - _frame_number(packet.dts, packet, part)


def _frame_number(time: int, packet: Any, part: Part) -> int:
    return round(time * packet.time_base * part.rate)


def _sound(source: Any, container: Any, start: Fraction, end: Fraction, name: str) -> list[Iterator[_Timed]]:
    """Add the source's sound to a file; what is between ``start`` and ``start + end``, as packets."""
    makers: dict[int, Callable[[Any], Iterator[Any]]] = {}
    streams = [each for each in source.streams.audio if each.codec_context is not None]
    in_quicktime = container.format.name == "mov"
    for stream in streams:
        name_of_codec = stream.codec_context.codec.canonical_name
        if name_of_codec in container.supported_codecs and (name_of_codec in _PLAYED or in_quicktime):
            makers[stream.index] = _copying(_copied_stream(container, stream), start)
        else:
            logger.info("the sound of %s, %s, becomes AAC", name, name_of_codec)
            makers[stream.index] = _encoding(container, stream, start, end)
    return [_cut(source, streams, makers, start, end, name)] if streams else []


def _cut(
    source: Any,
    streams: list[Any],
    makers: dict[int, Callable[[Any], Iterator[Any]]],
    start: Fraction,
    end: Fraction,
    name: str,
) -> Iterator[_Timed]:
    """Yield the packets that sound while there are pictures, at the pictures' times."""
    number, going = 0, {stream.index for stream in streams}
    packets = source.demux(*streams)
    while going:
        try:
            packet = next(packets, None)
            if packet is None:
                break
            index = packet.stream.index
            if packet.pts is not None:
                time = packet.pts * packet.time_base - start
                if time >= end:
                    going.discard(index)
                    continue
                if time + (packet.duration or 0) * packet.time_base < 0:
                    continue
            elif packet.size or index not in going:
                continue
            made = [*makers[index](packet)]
        except av.error.FFmpegError as error:
            logger.warning("the sound of %s is damaged, and ends early: %s", name, reason(error))
            break
        for each in made:
            number += 1
            yield each.dts * each.time_base, number, each


def _copying(track: Any, start: Fraction) -> Callable[[Any], Iterator[Any]]:
    def copied(packet: Any) -> Iterator[Any]:
        if packet.dts is None:  # the sign of the end
            return
        shift = round(start / packet.time_base)
        packet.stream, packet.pts, packet.dts = track, packet.pts - shift, packet.dts - shift
        yield packet

    return copied


def _encoding(container: Any, stream: Any, start: Fraction, end: Fraction) -> Callable[[Any], Iterator[Any]]:
    decoder = stream.codec_context
    rate = min(_AAC_RATES, key=lambda each: abs(each - decoder.sample_rate))
    layout = {1: "mono", 6: "5.1"}.get(decoder.layout.nb_channels, "stereo")  # by names that encoders know
    track = container.add_stream("aac", rate=rate, layout=layout)
    track.bit_rate = 96_000 * max(track.codec_context.layout.nb_channels, 1)
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
    unit, samples = Fraction(1, rate), 0  # so far

    def encoded(packet: Any) -> Iterator[Any]:
        nonlocal samples
        frames = [each for frame in stream.decode(packet) for each in resampler.resample(frame)]
        for frame in frames:
            if not samples:  # where it begins; after that one sample follows the other
                samples = round((frame.pts * frame.time_base - start) / unit)
            if samples * unit < end and samples + frame.samples > 0:
                frame.pts, frame.time_base = samples, unit
                yield from track.encode(frame)
            samples += frame.samples
        if not packet.size:
            yield from track.encode(None)

    return encoded
