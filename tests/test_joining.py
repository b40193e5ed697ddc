"""Files put together of parts, times and sound: frames in order, rates as they are, sound in step."""

from __future__ import annotations

import io
import logging
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from sample_videos import moving_frames

from modelscope_i2v.errors import OutputError
from modelscope_i2v.media.joining import Part, Sound, join_video
from modelscope_i2v.media.video import Encoding, Timing, open_video, read_video, write_video

NTSC = Fraction(30000, 1001)
SAMPLES = 48_000


def parts_of(folder: Path, frames: np.ndarray, *ends: int, rate: Fraction = NTSC) -> list[Part]:
    parts = []
    for start, end in zip((0, *ends), (*ends, len(frames))):
        path = str(folder / f"part{start}.mp4")
        write_video(frames[start:end], path, rate)
        parts.append(Part(path, end - start, rate))
    return parts


def clapper(seconds: float, at: float, codec: str, container: str, rate: int = 25) -> bytes:
    """A file that is black and silent but for one white frame and a click, both from ``at`` seconds on."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        video = output.add_stream("libx264", rate=rate)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = output.add_stream(codec, rate=SAMPLES, layout="mono")
        for index in range(round(seconds * rate)):
            level = 255 if index == round(at * rate) else 0
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8))
            frame.pts, frame.time_base = index, Fraction(1, rate)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        wave = np.zeros((1, round(seconds * SAMPLES)), np.float32)
        wave[:, round(at * SAMPLES) :][:, :960] = 0.9 * np.sin(np.arange(960) / 6)
        resampler = av.AudioResampler(audio.codec_context.format.name, "mono", SAMPLES, frame_size=1024)
        sound = av.AudioFrame.from_ndarray(wave, "fltp", "mono")
        sound.sample_rate, sound.pts, sound.time_base = SAMPLES, 0, Fraction(1, SAMPLES)
        for frame in [*resampler.resample(sound), *resampler.resample(None)]:
            output.mux(audio.encode(frame))
        output.mux(audio.encode(None))
    return file.getvalue()


def click(file: str | bytes) -> float:
    """When the first loud sample is heard, in seconds."""
    with av.open(io.BytesIO(file) if isinstance(file, bytes) else file) as container:
        for frame in container.decode(audio=0):
            samples = frame.to_ndarray().astype(np.float64)
            samples /= 1 if frame.format.name.startswith("flt") else 32768
            loud = np.flatnonzero(np.abs(samples).max(axis=0) > 0.3)
            if len(loud):
                return float(frame.pts * frame.time_base) + loud[0] / frame.sample_rate
    raise AssertionError("nothing is heard")


def packets(file: str | bytes, kind: str = "audio") -> list[bytes]:
    with av.open(io.BytesIO(file) if isinstance(file, bytes) else file) as container:
        stream = getattr(container.streams, kind)[0]
        return [bytes(packet) for packet in container.demux(stream) if packet.size]


@pytest.mark.parametrize("ends", [(), (7,), (1, 2, 12)])
def test_frames_of_all_parts_come_in_order_at_the_exact_rate(tmp_path, ends):
    frames = moving_frames(13, 48, 64)
    parts = parts_of(tmp_path, frames, *ends)
    path = join_video(parts, tmp_path / "out.mp4", Timing(1 / NTSC), {"seed": "1"})
    video = read_video(path)
    assert video.metadata == {"seed": "1"} and len(video.frames) == 13
    assert (
        np.abs(video.frames[:, :, :4].mean((1, 2, 3)) - 20 * np.arange(13)).max() < 4
    )  # each has its number
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == NTSC and stream.duration * stream.time_base == 13 / NTSC
        times = [frame.pts * stream.time_base for frame in container.decode(stream)]
    assert times == [index / NTSC for index in range(13)]


def test_variable_rates_keep_their_time_stamps(tmp_path):
    stamps = (0, 40, 41, 200, 1000, 1033, 1500)
    parts = parts_of(tmp_path, moving_frames(7, 48, 64), 3)
    path = join_video(parts, tmp_path / "out.mp4", Timing(Fraction(1, 1000), stamps))
    with open_video(path) as reader:
        assert sum(1 for _ in reader) == 7
        timing = reader.timing()
    assert [timing.seconds(index) for index in range(7)] == [Fraction(stamp, 1000) for stamp in stamps]


@pytest.mark.parametrize("codec, container", [("aac", "mp4"), ("libmp3lame", "mp4"), ("aac", "mpegts")])
def test_sound_is_copied_as_it_is_where_the_file_takes_it(tmp_path, codec, container):
    source = clapper(2, 1.2, codec, container)
    with open_video(source) as reader:
        frames = np.stack(list(reader))
        sound = Sound(source, reader.start)
        timing = reader.timing()
    path = join_video(parts_of(tmp_path, frames, 20), tmp_path / "out.mp4", timing, None, sound)
    copied, given = packets(path), packets(source)  # in MPEG-TS behind headers of seven bytes
    assert len(copied) > 70 and all(any(b.endswith(a) for b in given) for a in copied)
    assert abs(click(path) - 1.2) < 0.03
    assert read_video(path).frames[30].mean() > 200  # the white frame, at 1.2 s


@pytest.mark.parametrize("codec, container", [("pcm_s16le", "matroska"), ("pcm_s16le", "avi")])
def test_other_sound_becomes_aac_in_step(tmp_path, codec, container):
    source = clapper(2, 1.2, codec, container)
    parts = parts_of(tmp_path, moving_frames(50, 64, 64), rate=Fraction(25))
    path = join_video(parts, tmp_path / "out.mp4", Timing(Fraction(1, 25)), None, Sound(source))
    with av.open(path) as opened:
        assert opened.streams.audio[0].codec_context.name == "aac"
    assert abs(click(path) - 1.2) < 0.03


def test_a_quicktime_file_keeps_pcm(tmp_path):
    source = clapper(1, 0.5, "pcm_s16le", "matroska")
    parts = parts_of(tmp_path, moving_frames(25, 64, 64), rate=Fraction(25))
    path = join_video(parts, tmp_path / "out.mov", Timing(Fraction(1, 25)), None, Sound(source))
    with av.open(path) as opened:
        assert opened.streams.audio[0].codec_context.name == "pcm_s16le"
    assert abs(click(path) - 0.5) < 0.01


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_sound_is_cut_with_the_video(tmp_path, codec):
    """It begins with the first frame and ends with the last, wherever these were in the source."""
    source = clapper(4, 1.2, codec, "matroska")
    parts = parts_of(tmp_path, moving_frames(20, 64, 64), rate=Fraction(25))
    sound = Sound(source, Fraction(1))
    path = join_video(parts, tmp_path / "out.mp4", Timing(Fraction(1, 25)), None, sound)
    with av.open(path) as opened:
        assert opened.duration / 1e6 == pytest.approx(0.8, abs=0.05)
    assert abs(click(path) - 0.2) < 0.03


def test_a_source_without_sound_is_silent(tmp_path):
    source = tmp_path / "silent.mp4"
    write_video(moving_frames(5, 64, 64), source)
    parts = parts_of(tmp_path, moving_frames(5, 64, 64))
    path = join_video(parts, tmp_path / "out.mp4", Timing(1 / NTSC), None, Sound(str(source)))
    with av.open(path) as opened:
        assert not opened.streams.audio


def test_damaged_sound_ends_early_and_is_said(tmp_path, caplog):
    source = bytearray(clapper(4, 0.2, "aac", "matroska"))
    source = bytes(source[: len(source) * 2 // 3])
    parts = parts_of(tmp_path, moving_frames(100, 64, 64), rate=Fraction(25))
    with caplog.at_level(logging.WARNING):
        path = join_video(parts, tmp_path / "out.mp4", Timing(Fraction(1, 25)), None, Sound(source))
    assert len(read_video(path).frames) == 100 and abs(click(path) - 0.2) < 0.03


def test_a_file_that_cannot_be_joined_leaves_nothing(tmp_path):
    parts = parts_of(tmp_path, moving_frames(3, 64, 64))
    (tmp_path / "new").mkdir()
    parts.append(Part(str(tmp_path / "gone.mp4"), 1, NTSC))
    with pytest.raises(OutputError, match="cannot write the video"):
        join_video(parts, tmp_path / "new" / "a.mp4", Timing(1 / NTSC))
    assert not [*(tmp_path / "new").iterdir()]


# Encodings


@pytest.mark.parametrize(
    "encoding, name, pix_fmt",
    [
        (Encoding("hevc"), "hevc", "yuv420p"),
        (Encoding("hevc", 10, "yuv420p10le"), "hevc", "yuv420p10le"),
        (Encoding("vp9"), "vp9", "yuv420p"),
        (Encoding("h264", 30, "yuv444p"), "h264", "yuv444p"),
        (Encoding("prores"), "prores", "yuv422p10le"),
    ],
)
def test_encodings(tmp_path, encoding, name, pix_fmt):
    frames = moving_frames(4, 48, 64)
    path = tmp_path / ("a.mov" if name == "prores" else "a.mp4")
    write_video(frames.astype(np.uint16) * 257 if encoding.is_deep else frames, path, 25, None, encoding)
    with av.open(str(path)) as opened:
        context = opened.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == (name, pix_fmt)
    assert np.abs(read_video(path).frames.astype(int) - frames).mean() < 8


def test_ten_bits_hold_what_eight_do_not(tmp_path):
    levels = np.linspace(20_000, 21_000, 256).astype(np.uint16)
    ramp = np.broadcast_to(levels[None, None, :, None], (2, 64, 256, 3))
    write_video(ramp, tmp_path / "a.mp4", 25, None, Encoding("hevc", 4, "yuv420p10le"))
    with av.open(str(tmp_path / "a.mp4")) as opened:
        frame = next(opened.decode(video=0))
        luma = np.frombuffer(bytes(frame.planes[0]), np.uint16).reshape(64, -1)[32, :256]
    assert len(np.unique(luma)) > 8  # 8 bits would have 4 levels there
