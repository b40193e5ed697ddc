"""Reading videos: every kind of file, exactly, and every way a file can be wrong."""

from __future__ import annotations

import io
import logging
import random
import threading
import tracemalloc
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from live_memory import memory_left
from PIL import Image
from sample_videos import FRAMES, foreign_file, moving_frames, psnr, with_display_matrix

from modelscope_i2v.errors import InvalidInputError, MissingFileError, NotEnoughMemoryError
from modelscope_i2v.media import video_reading
from modelscope_i2v.media.video import open_video, read_metadata, read_video, video_bytes


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return video_bytes(FRAMES)


@contextmanager
def serving(folder: Path, requests: list[str]):
    """The address of a server of the files in ``folder``, which notes what is asked for."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            requests.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_sources(tmp_path, mp4, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    path = tmp_path / "a.mp4"
    path.write_bytes(mp4)
    with serving(tmp_path, []) as address:
        url = f"http://user:secret@{address}/"
        for source in (path, str(path), path.as_uri(), mp4, memoryview(mp4), url + "a.mp4?token=secret"):
            assert read_video(source).frames.shape == FRAMES.shape
        with pytest.raises(InvalidInputError, match="b.mp4: the server answered 404") as caught:
            read_video(url + "b.mp4?token=secret")
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "codec, pix_fmt, container",
    [("ffv1", "bgr0", "matroska"), ("ffv1", "bgr0", "avi"), ("ffv1", "bgr0", "nut"), ("png", "rgb24", "mov")],
)
def test_lossless_files_come_out_exactly(codec, pix_fmt, container):
    np.testing.assert_array_equal(read_video(foreign_file(FRAMES, codec, pix_fmt, container)).frames, FRAMES)


@pytest.mark.parametrize(
    "codec, pix_fmt, container",
    [
        ("libvpx-vp9", "yuv420p", "webm"),
        ("libx264", "yuv420p10le", "mp4"),
        ("libx264", "yuv444p", "matroska"),
        ("mpeg4", "yuv420p", "avi"),
        ("mpeg2video", "yuv420p", "mpegts"),
        ("mpeg2video", "yuv420p", "mpeg"),
        ("flv", "yuv420p", "flv"),
        ("libx264", "yuv420p", "h264"),
        ("mjpeg", "yuvj420p", "mov"),
        ("ffv1", "bgra", "matroska"),
        ("apng", "rgb24", "apng"),
        ("ffv1", "gray", "matroska"),
    ],
)
def test_codecs_and_containers(codec, pix_fmt, container, monkeypatch):
    fps = 25  # MPEG-2 knows few rates, and a raw H.264 stream none
    video = read_video(foreign_file(FRAMES, codec, pix_fmt, container, fps, **{"b": "4000000"}))
    assert video.frames.shape == FRAMES.shape and video.fps == pytest.approx(fps, rel=0.01)
    expected = FRAMES
    if pix_fmt == "gray":
        expected = (FRAMES @ [0.299, 0.587, 0.114])[..., None].repeat(3, -1)
    assert min(psnr(ours, given) for ours, given in zip(video.frames, expected)) > 24


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (33, 31)])
def test_odd_sizes(size):
    frames = FRAMES[:, : size[0], : size[1]]
    np.testing.assert_array_equal(read_video(foreign_file(frames)).frames, frames)


def test_alpha_is_dropped():
    rgba = np.dstack([np.full((8, 8, 3), (200, 100, 50), np.uint8), np.zeros((8, 8, 1), np.uint8)])
    video = read_video(foreign_file([rgba, rgba], pix_fmt="bgra", source="rgba"))
    assert video.frames.shape == (2, 8, 8, 3) and (video.frames == (200, 100, 50)).all()


def test_animated_gif():
    images = [Image.new("RGB", (9, 7), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=100, loop=0)
    video = read_video(file.getvalue())
    assert video.fps == pytest.approx(10) and [tuple(f[3, 3]) for f in video.frames] == [
        image.getpixel((0, 0)) for image in images
    ]


@pytest.mark.parametrize("matrix, bt709", [("bt709", True), ("smpte170m", False)])
def test_the_files_own_colour_matrix_is_used(matrix, bt709):
    red = np.broadcast_to(np.array([220, 40, 40], np.uint8), (2, 32, 32, 3))
    # Values of the BT.601 matrix, honestly labelled or mislabelled as BT.709.
    data = foreign_file(red, "libx264", "yuv420p", "mp4", colorspace=matrix)
    error = np.abs(read_video(data).frames.astype(int) - red).max()
    assert (error > 10) if bt709 else (error < 5)


MATRICES = {
    (1, 0, 0, 1): lambda f: f,
    (0, 1, -1, 0): lambda f: np.rot90(f, -1, (1, 2)),  # clockwise
    (-1, 0, 0, -1): lambda f: np.rot90(f, 2, (1, 2)),
    (0, -1, 1, 0): lambda f: np.rot90(f, 1, (1, 2)),
    (-1, 0, 0, 1): lambda f: f[:, :, ::-1],
    (1, 0, 0, -1): lambda f: f[:, ::-1],
    (0, 1, 1, 0): lambda f: f.transpose(0, 2, 1, 3),
    (0, -1, -1, 0): lambda f: f.transpose(0, 2, 1, 3)[:, ::-1, ::-1],
    (0, 0, 0, 0): lambda f: f,
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_rotation_and_mirroring(mp4, matrix):
    expected = MATRICES[matrix](read_video(mp4).frames)
    video = read_video(with_display_matrix(mp4, *matrix))
    np.testing.assert_array_equal(video.frames, expected)
    assert video.frames.flags.c_contiguous


@pytest.mark.parametrize("container", ["matroska", "mp4"])
def test_variable_frame_rate(container):
    times = [0, 40, 80, 400, 410, 900, 1000, 1100, 1150, 1800]  # milliseconds
    codec, pix_fmt = ("ffv1", "bgr0") if container == "matroska" else ("libx264", "yuv420p")
    video = read_video(foreign_file(FRAMES, codec, pix_fmt, container, times=times))
    assert len(video.frames) == 10 and psnr(video.frames, FRAMES) > 28
    assert video.fps == pytest.approx(9 / 1.8, rel=0.05)


def test_b_frames_come_in_presentation_order():
    options = {"x264-params": "bframes=4:b-adapt=0", "crf": "5"}
    data = foreign_file(FRAMES, "libx264", "yuv420p", "mp4", **options)
    numbers = read_video(data).frames[:, :, 2:5].mean((1, 2, 3))
    assert np.abs(numbers - 20 * np.arange(10)).max() < 6


def test_no_duration_in_the_header():
    class Pipe:  # cannot seek, so the writer cannot go back and fill in the header
        def __init__(self):
            self.data = bytearray()

        def write(self, data):
            self.data += data
            return len(data)

    pipe = Pipe()
    with av.open(pipe, "w", format="matroska") as output:
        stream = output.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "bgr0"
        for pixels in FRAMES:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            output.mux(stream.encode(frame.reformat(format="bgr0")))
        output.mux(stream.encode(None))
    with av.open(io.BytesIO(bytes(pipe.data))) as container:
        assert not container.duration
    video = read_video(bytes(pipe.data))
    np.testing.assert_array_equal(video.frames, FRAMES)
    assert video.fps == 8


def test_unknown_frame_rate(caplog, monkeypatch):
    monkeypatch.setattr(video_reading, "_plausible", lambda rate: False)
    with caplog.at_level(logging.INFO, "modelscope_i2v"):
        assert read_video(video_bytes(FRAMES, fps=30)).fps == 8
    assert "does not tell its frame rate; taken as 8" in caplog.text


def test_max_frames(mp4, caplog):
    with caplog.at_level(logging.INFO, "modelscope_i2v"):
        np.testing.assert_array_equal(read_video(mp4, max_frames=10).frames, read_video(mp4).frames)
        assert "more frames" not in caplog.text
        np.testing.assert_array_equal(read_video(mp4, max_frames=3).frames, read_video(mp4).frames[:3])
        assert "has more frames; the first 3 were read" in caplog.text
    for wrong in (0, -1, 2.5, "3", -(10**5000)):
        with pytest.raises(InvalidInputError, match="max_frames is"):
            read_video(mp4, max_frames=wrong)


def test_frame_by_frame(mp4):
    whole = read_video(mp4)
    with open_video(with_display_matrix(mp4, 0, 1, -1, 0), max_frames=4) as reader:
        assert (reader.size, reader.fps, reader.metadata) == ((48, 64), 8, {})
        frames = iter(reader)
        np.testing.assert_array_equal(next(frames), np.rot90(whole.frames[0], -1))
        assert len(list(frames)) == 3 and not list(reader)


def test_what_is_done_with_the_frames_fails_as_it_likes(mp4):
    with pytest.raises(ZeroDivisionError), open_video(mp4) as reader:
        for _ in reader:
            raise ZeroDivisionError


def test_rate_by_the_times_of_frames():
    data = foreign_file(FRAMES, times=[0, 40, 80, 400, 410, 900, 1000, 1100, 1150, 1800])
    with open_video(data) as reader:
        assert len(list(reader)) == 10 and reader.fps == pytest.approx(5)


def test_a_frame_at_a_time_is_held():
    black = np.broadcast_to(np.uint8(0), (1, 1000, 1000, 3))
    data = video_bytes(black.repeat(40, 0))
    tracemalloc.start()
    with open_video(data) as reader:
        count = sum(1 for _ in reader)
    assert (count, tracemalloc.get_traced_memory()[1] < 5 * 3_000_000) == (40, True)
    tracemalloc.stop()


def test_memory_that_runs_out():
    data = video_bytes(np.broadcast_to(np.uint8(0), (20, 2000, 2000, 3)))
    with memory_left(200_000_000), pytest.raises(NotEnoughMemoryError, match="more memory than there is"):
        read_video(data)


def test_a_size_that_changes(caplog):
    first = foreign_file(FRAMES, "libx264", "yuv420p", "h264")
    second = foreign_file(moving_frames(5, 32, 96), "libx264", "yuv420p", "h264")
    video = read_video(first + second)
    assert video.frames.shape == (15, 48, 64, 3)
    assert caplog.text.count("changes its size to 96x32 at frame 10; all are resized to 64x48") == 1
    shrunk = np.asarray(Image.fromarray(moving_frames(5, 32, 96)[0]).resize((64, 48)))
    assert psnr(video.frames[10], shrunk) > 18


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("part", [0.55, 0.8])
def test_cut_short(container, part, caplog):
    noise = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    if container == "mp4":
        data = video_bytes(noise)
    else:
        data = foreign_file(noise, "mpeg2video", "yuv420p", container, 25, b="4000000")
    whole = read_video(data).frames
    caplog.clear()
    video = read_video(data[: int(len(data) * part)])
    assert 1 <= len(video.frames) < 12
    assert (video.frames[0] == whole[0]).all()
    if container == "mp4":
        assert f"announces 12 frames; {len(video.frames)} decoded" in caplog.text


def test_damage_in_the_middle(mp4, caplog):
    data = bytearray(foreign_file(FRAMES, container="matroska"))
    at = len(data) // 2
    data[at : at + 400] = bytes(400)
    video = read_video(bytes(data))
    assert 1 <= len(video.frames) <= 10


def test_empty_packets_are_no_damage(caplog):
    """AVI and Theora say "the last frame again" with a packet of no bytes."""
    data = bytearray(foreign_file(FRAMES, "png", "rgb24", "mov"))
    last_size = data.index(b"stsz") + 16 + 4 * 9
    data[last_size : last_size + 4] = bytes(4)
    np.testing.assert_array_equal(read_video(bytes(data)).frames, FRAMES[:9])
    assert "damaged" not in caplog.text


def test_metadata_of_another_encoding():
    data = video_bytes(FRAMES[:1], metadata={"title": "cafXX"}).replace(b"cafXX", b"caf\xe9\xe9")
    assert read_metadata(data) == {"title": "caf\ufffd\ufffd"}


def test_the_extension_does_not_matter(tmp_path, mp4, monkeypatch):
    opened, real_open = [], av.open
    monkeypatch.setattr(
        av, "open", lambda file, *args, **options: opened.append(file) or real_open(file, *args, **options)
    )
    (tmp_path / "a.h264").write_bytes(bytes(5000))
    with pytest.raises(InvalidInputError, match="it seems to be no known kind of file"):
        read_video(tmp_path / "a.h264")
    (tmp_path / "a.gif").write_bytes(mp4)
    assert len(read_video(tmp_path / "a.gif").frames) == 10
    assert len(opened) == 2 and not any(hasattr(file, "name") for file in opened)


def test_files_without_video():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        output.mux(stream.encode(frame))
    with pytest.raises(InvalidInputError, match=r"has no video stream \(it has: audio\)"):
        read_video(file.getvalue())


def test_header_without_frames(mp4):
    with pytest.raises(InvalidInputError, match="has no frame that can be decoded"):
        read_video(mp4[: mp4.index(b"mdat") + 8])


PLAYLISTS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
    "list.ffconcat": "ffconcat version 1.0\nfile {path}\n",
    "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "a.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1"><BaseURL>{url}</BaseURL></Representation></AdaptationSet>'
    "</Period></MPD>",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_names_inside_files_are_not_followed(tmp_path, mp4, name):
    (tmp_path / "a.mp4").write_bytes(mp4)
    requests: list[str] = []
    with serving(tmp_path, requests) as address:
        url, port = f"http://{address}/a.mp4", address.partition(":")[2]
        text = PLAYLISTS[name].format(path=tmp_path / "a.mp4", url=url, port=port).encode()
        for file in (tmp_path / name, tmp_path / "renamed.mp4"):
            file.write_bytes(text)
            for source in (file, text):
                with pytest.raises(InvalidInputError, match="cannot be read: it seems to be an? "):
                    read_video(source)
    assert not requests


@pytest.mark.parametrize(
    "name", ["concat:a.mp4|b.mp4", "http:", "subfile,,start,0,end,9,,:a.mp4", "pipe:0", "a:b.mp4"]
)
def test_file_names_are_not_protocols(tmp_path, mp4, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="does not exist"):
        read_video(name)
    Path(name).write_bytes(mp4)
    assert len(read_video(name).frames) == 10


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "0 bytes"),
        (b"<!DOCTYPE html><html></html>", "an HTML page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
        (b"just words\n" * 50, "a text"),
        (bytes(5000), "no known kind of file"),
    ],
)
def test_files_that_are_no_videos(tmp_path, data, words):
    (tmp_path / "a.mp4").write_bytes(data)
    for source in (data, tmp_path / "a.mp4"):
        with pytest.raises(InvalidInputError, match=words if data else "empty"):
            read_video(source)
        with pytest.raises(InvalidInputError):
            read_metadata(source)


@pytest.mark.parametrize("source", [None, 5, FRAMES, [b"x"]])
def test_things_that_are_no_videos(source):
    with pytest.raises(InvalidInputError, match="give a path, a URL or bytes"):
        read_video(source)


def test_memory_is_bounded(mp4, monkeypatch):
    monkeypatch.setattr(video_reading, "MAX_DECODED_BYTES", 3 * 64 * 48 * 4)
    assert len(read_video(mp4, max_frames=4).frames) == 4
    with pytest.raises(
        InvalidInputError, match="with frame 5 its 64x48 frames exceed 36,864 bytes; read fewer"
    ):
        read_video(mp4)
    monkeypatch.setattr(video_reading, "MAX_SIDE", 63)
    with pytest.raises(InvalidInputError, match="too large: 64x48; allowed are 63 pixels a side"):
        read_video(mp4)
    monkeypatch.setattr(video_reading, "MAX_BYTES", 100)
    with pytest.raises(InvalidInputError, match="larger than the 100 bytes allowed"):
        read_video(mp4)


SMALL = moving_frames(4, 16, 16)
FUZZED = {
    "mp4": video_bytes(SMALL),
    "webm": foreign_file(SMALL, "libvpx-vp9", "yuv420p", "webm", **{"deadline": "realtime"}),
    "avi": foreign_file(SMALL, "mpeg4", "yuv420p", "avi"),
    "mpegts": foreign_file(SMALL, "mpeg2video", "yuv420p", "mpegts", 25),
    "gif": foreign_file(SMALL, "gif", "rgb8", "gif"),
}


@pytest.mark.parametrize("kind", FUZZED)
def test_damaged_files_raise_only_our_errors(kind):
    data, rng, decoded = FUZZED[kind], random.Random(kind), 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        try:
            video = read_video(bytes(damaged), max_frames=50)
        except InvalidInputError:
            continue
        decoded += 1
        assert video.frames.dtype == np.uint8 and video.frames.ndim == 4 and 0 < video.fps <= 1000
    assert decoded
