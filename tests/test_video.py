"""Writing videos: content, properties of the file, determinism, and every way it can fail."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from sample_videos import FRAMES, moving_frames, psnr

from modelscope_i2v.errors import InvalidInputError, OutputError
from modelscope_i2v.media import video_writing
from modelscope_i2v.media.video import (
    Video,
    check_writable,
    read_metadata,
    read_video,
    video_bytes,
    write_video,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return video_bytes(FRAMES)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.M4V", "no extension"])
def test_round_trip(tmp_path, name):
    path = tmp_path / name
    assert write_video(FRAMES, path, fps=8, metadata={"seed": "666"}) == str(path)
    video = read_video(path)
    assert isinstance(video, Video) and video.frames.dtype == np.uint8 and video.fps == 8
    assert video.frames.shape == FRAMES.shape and video.metadata == {"seed": "666"}
    assert min(psnr(ours, given) for ours, given in zip(video.frames, FRAMES)) > 32
    assert os.listdir(tmp_path) == [name]


def test_properties_of_the_file(mp4):
    with av.open(io.BytesIO(mp4)) as container:
        (stream,) = container.streams
        context = stream.codec_context
        assert "mp4" in container.format.name and context.name == "h264" and context.pix_fmt == "yuv420p"
        assert (context.width, context.height, stream.frames) == (64, 48, 10)
        assert stream.average_rate == 8 and stream.start_time == 0
        assert container.duration == 10 / 8 * 1e6 and stream.duration * stream.time_base == Fraction(10, 8)
        assert [frame.pts * stream.time_base for frame in container.decode(stream)] == [
            Fraction(i, 8) for i in range(10)
        ]
    assert mp4.index(b"moov") < mp4.index(b"mdat")  # playable while it downloads
    options = mp4[mp4.index(b"x264 - core") :][:1000]
    assert b"crf=17.0" in options and b"keyint=250" in options and b"subme=7" in options  # preset medium
    assert b"Lav" not in mp4  # no library versions


def test_colours_are_limited_range_bt601():
    """The conversion of ``ffmpeg -pix_fmt yuv420p``, and the tag that tells players so."""
    colour = np.array([200, 30, 60])
    data = video_bytes(np.broadcast_to(colour.astype(np.uint8), (2, 32, 32, 3)))
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
        got = [int(np.frombuffer(bytes(plane), np.uint8)[plane.line_size * 4 + 4]) for plane in frame.planes]
        assert (frame.colorspace, frame.color_range) == (6, 1)
    kr, kb = 0.299, 0.114
    luma = np.dot([kr, 1 - kr - kb, kb], colour)
    expected = [
        16 + 219 * luma / 255,
        128 + 224 * (colour[2] - luma) / (2 * (1 - kb)) / 255,
        128 + 224 * (colour[0] - luma) / (2 * (1 - kr)) / 255,
    ]
    assert np.abs(np.subtract(got, expected)).max() <= 1.5
    assert np.abs(read_video(data).frames.astype(int) - colour).max() <= 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_frames(count):
    data = video_bytes(FRAMES[:count])
    assert read_video(data).frames.shape[0] == count
    with av.open(io.BytesIO(data)) as container:
        assert container.duration == count / 8 * 1e6


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (47, 64), (48, 63), (3, 299)])
def test_odd_sizes_repeat_the_edge(height, width, caplog):
    frames = moving_frames(2, 48, 300)[:, :height, :width]
    with caplog.at_level(logging.INFO, "modelscope_i2v"):
        video = read_video(video_bytes(frames))
    even = (height + height % 2, width + width % 2)
    assert video.frames.shape[1:3] == even
    assert f"become {even[1]}x{even[0]}" in caplog.text
    assert psnr(video.frames[:, :height, :width], frames) > 25
    if width % 2 and width > 1:
        assert np.abs(video.frames[:, :, -1].astype(int) - video.frames[:, :, -2]).mean() < 6


@pytest.mark.parametrize(
    "fps, expected",
    [(8, 8), (7.5, 7.5), (Fraction(30000, 1001), 30000 / 1001), (30000 / 1001, 30000 / 1001), (0.5, 0.5),
     (23.976, 23.976), (np.float32(12.5), 12.5), (1000, 1000), (np.int64(24), 24)],
)  # fmt: skip
def test_frame_rates(fps, expected):
    assert read_video(video_bytes(FRAMES[:5], fps=fps)).fps == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "fps",
    [0, -1, float("nan"), float("inf"), 1e9, "8", None, True, 1j, 10**5000, Fraction(10**5000)],
    ids=range(11),
)
def test_refused_frame_rates(fps):
    with pytest.raises(InvalidInputError, match="allowed are numbers from 0.01 to 1000"):
        video_bytes(FRAMES, fps=fps)


def test_metadata_of_any_key(tmp_path):
    metadata = {
        "seed": "666",
        "title": 'A "title"; $(x)',
        "comment": "two\nlines = \\",
        "приглашение": "图像 🎞",
        "k" * 300: "v" * 100_000,
        "com.example/a b": " spaces ",
        "empty": "",
        "date": "2023",
        "location": "here",
        "language": "xx",
        "rotate": "90",
    }
    for name in ("a.mp4", "a.mov"):
        path = write_video(FRAMES[:2], tmp_path / name, metadata=metadata)
        assert read_metadata(path) == metadata
        assert read_video(path).frames.shape == FRAMES[:2].shape  # "rotate" is only a word


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"a": 1}, "both must be str"),
        ({"a": 10**5000}, "both must be str"),
        ({1: "a"}, "both must be str"),
        ({"": "a"}, "the key not empty"),
        ({"a": "b\0c"}, "null characters"),
        ({"a": "\ud800"}, "not valid Unicode"),
        ({"seed": "1", "Seed": "2"}, "differ in more than case"),
        ({"Encoder": "x"}, "keeps for itself"),
        ({"timecode": "01:00:00:00"}, "keeps for itself"),
        ("seed=1", "metadata is a str"),
    ],
)
def test_refused_metadata(metadata, words):
    with pytest.raises(InvalidInputError, match=words):
        video_bytes(FRAMES, metadata=metadata)


@pytest.mark.parametrize(
    "frames, words",
    [
        (FRAMES[:0], "there are no frames"),
        (iter(()), "there are no frames"),
        (FRAMES[0], r"shape \(48, 64, 3\)"),
        (FRAMES.astype(np.float32), "frame 0 is of type float32"),
        (FRAMES[..., :2], r"shape \(48, 64, 2\)"),
        (FRAMES[:, :0], r"shape \(0, 64, 3\)"),
        (np.zeros((1, 2, video_writing.MAX_SIDE + 1, 3), np.uint8), "H and W from 1 to 8192"),
        ([FRAMES[0], FRAMES[0][:40]], r"frame 1 has the shape \(40, 64, 3\).*\(48, 64, 3\)"),
        ([FRAMES[0], "x"], "frame 1 is of type str"),
        (np.ma.masked_array(FRAMES, FRAMES > 200), "frame 0 is of type MaskedArray"),
        (None, "frames is a NoneType"),
        (5, "frames is a int"),
    ],
)
def test_refused_frames(tmp_path, frames, words):
    with pytest.raises(InvalidInputError, match=words):
        write_video(frames, tmp_path / "a.mp4")
    assert not os.listdir(tmp_path)


def test_frames_from_an_iterable(mp4):
    assert video_bytes(frame for frame in FRAMES) == mp4
    assert video_bytes(list(FRAMES)) == mp4
    assert video_bytes(np.asfortranarray(FRAMES)) == mp4
    mirrored = np.ascontiguousarray(FRAMES[:, :, ::-1])
    assert video_bytes(mirrored[:, :, ::-1]) == mp4


CHILD = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import hashlib, numpy as np
from modelscope_i2v.media.video import video_bytes
frames = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(6, 240, 320, 3)
print(hashlib.sha256(video_bytes(frames, metadata={"b": "2", "a": "1"})).hexdigest())
"""


def test_same_bytes_in_every_process_and_on_one_core():
    frames = np.random.default_rng(1).integers(0, 256, (6, 240, 320, 3), dtype=np.uint8)
    ours = hashlib.sha256(video_bytes(frames, metadata={"a": "1", "b": "2"})).hexdigest()
    for filling in ("0", "85", "255"):  # of memory that the C library hands out: none of it may matter
        child = subprocess.run(
            [sys.executable, "-c", CHILD],
            input=frames.tobytes(),
            env={**os.environ, "MALLOC_PERTURB_": filling},
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert child.stdout.decode().strip() == ours
    assert b" threads=4 " in video_bytes(np.zeros((1, 512, 512, 3), np.uint8))  # not the number of cores


@pytest.mark.parametrize(
    "name", ["a b.mp4", 'it\'s "q";$(x).mp4', "-y.mp4", "ключ 图.mp4", "a\nb.mp4", "%d.mp4", ".mp4"]
)
@pytest.mark.parametrize("folder", ["plain", "file:x?y#z %03d 图"])
def test_any_name(tmp_path, mp4, folder, name):
    path = tmp_path / folder / name
    check_writable(path)
    assert not os.listdir(tmp_path)
    write_video(FRAMES, path)
    assert path.read_bytes() == mp4 and os.listdir(path.parent) == [name]
    assert len(read_video(path).frames) == 10


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write_video(FRAMES[:1], "~/a.mp4") == str(tmp_path / "a.mp4")
    assert len(read_video("~/a.mp4").frames) == 1


@pytest.mark.parametrize(
    "act", [check_writable, lambda path: write_video(FRAMES, path)], ids=["check", "write"]
)
def test_refused_targets(tmp_path, act):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    for path, words in [
        (tmp_path / "a.avi", "'.avi' is not among the extensions allowed, .mp4, .m4v, .mov"),
        (tmp_path / "folder.mp4", "folder.mp4': it is a folder"),
        (tmp_path / "file" / "a.mp4", "Not a directory"),
        (tmp_path / ("x" * 300 + ".mp4"), "File name too long"),
        (None, "give a path"),
    ]:
        with pytest.raises(OutputError, match=words):
            act(path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


@pytest.mark.parametrize("exception", [KeyboardInterrupt, ValueError("mine")])
def test_what_the_frames_raise_passes(tmp_path, exception):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def frames():
        yield from FRAMES
        raise exception

    with pytest.raises(exception if isinstance(exception, type) else type(exception), match=None):
        write_video(frames(), path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.mp4": b"old"}


def test_full_disk(tmp_path, mp4):
    """Whatever the byte at which the disk is full: an error with the system's words, and the old file."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (4, len(mp4) // 3, len(mp4) // 2, len(mp4) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OutputError, match="a.mp4': File too large"):
                write_video(FRAMES, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.mp4": b"old"}


def test_video_bytes_leaves_nothing(tmp_path, monkeypatch, mp4):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert video_bytes(FRAMES) == mp4
    with pytest.raises(InvalidInputError):
        video_bytes([FRAMES[0], None])
    assert not os.listdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(OutputError, match="No such file"):
        video_bytes(FRAMES)


# A child of something that runs in the background ignores SIGINT from the start, and Python then goes on so.
ENDLESS = """
import signal, sys, time, numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)
from modelscope_i2v.media.video import write_video
def frames():
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        time.sleep(0.001)
write_video(frames(), sys.argv[1])
"""


@pytest.mark.parametrize(
    "sent, old, delay", [("KILL", None, 0), ("KILL", b"old", 0.1), ("INT", b"old", 0.05)]
)
def test_killed_while_encoding(tmp_path, sent, old, delay):
    path = tmp_path / "a.mp4"
    if old:
        path.write_bytes(old)
    child = subprocess.Popen([sys.executable, "-c", ENDLESS, path], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not any(p.suffix == ".part" for p in tmp_path.iterdir()):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.005)
    time.sleep(delay)
    child.send_signal(getattr(signal, f"SIG{sent}"))
    child.wait(timeout=30)
    assert (path.read_bytes() if path.exists() else None) == old
    assert len(list(tmp_path.glob(".i2v-*"))) == (sent == "KILL")
    write_video(FRAMES[:1], path)
    assert len(read_video(path).frames) == 1
