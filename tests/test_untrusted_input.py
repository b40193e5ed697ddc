"""Inputs that nobody vouches for: too much, made to hurt, or with secrets in their names."""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import traceback
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from modelscope.outputs import OutputKeys
from modelscope.pipelines import pipeline
from sample_videos import moving_frames
from stage_pipelines import STAGES, built, video_of

from modelscope_i2v.errors import CheckpointError, InvalidInputError, MissingFileError, OutputError
from modelscope_i2v.media.video import read_metadata, read_video, video_bytes
from modelscope_i2v.settings import record as provenance

# Weights files


@pytest.mark.parametrize(
    "name, contents, error, words",
    [
        ("ckpt_unet", b"", CheckpointError, "empty (0 bytes)"),
        ("ckpt_unet", bytes(5000), CheckpointError, "filled with zeros"),
        ("ckpt_clip", b"<!DOCTYPE html><html>", CheckpointError, "web page (HTML)"),
        ("ckpt_autoencoder", None, MissingFileError, "did you mean 'v2-1_512-ema-pruned (1).ckpt'"),
    ],
)
def test_a_wrong_weights_file_is_named_by_modelscopes_own_call(
    small_model, tmp_path, name, contents, error, words
):
    folder = tmp_path / "model"
    shutil.copytree(small_model[0], folder)
    (folder / "v2-1_512-ema-pruned.ckpt").rename(folder / "v2-1_512-ema-pruned (1).ckpt")
    if contents is not None:
        shutil.copy(folder / "v2-1_512-ema-pruned (1).ckpt", folder / "v2-1_512-ema-pruned.ckpt")
    files = {"ckpt_unet": "base_03_alldata_fps_v_80g_0789000.pth", "ckpt_clip": "open_clip_pytorch_model.bin"}
    if name in files:
        (folder / files[name]).write_bytes(contents)
    with pytest.raises(error) as caught:
        pipeline(STAGES[0], model=str(folder), device="cpu")
    assert words in str(caught.value) and files.get(name, "v2-1_512-ema-pruned.ckpt") in str(caught.value)


# Limits


def test_a_video_of_more_frames_than_allowed_is_refused_before_work(pipes, inputs, monkeypatch):
    pipe = pipes[STAGES[1]]
    long = video_bytes(moving_frames(12, 40, 64))
    monkeypatch.setattr(pipe.model.cfg, "limit_frames", 8)
    read, steps = [], []
    stage, transform = pipe.model.stage, pipe.model.stage.transform
    monkeypatch.setattr(stage, "transform", lambda frames: read.append(len(frames)) or transform(frames))
    with pytest.raises(InvalidInputError, match="has 9 frames or more; limit_frames allows 8.*raise limit_f"):
        pipe(long, callback=lambda *step: steps.append(step))
    assert read == [1] * 9 and not steps
    with pytest.raises(InvalidInputError, match="limit_frames allows 8"):
        pipe.model({"video_data": torch.zeros(9, 3, 16, 16)})
    pipe.model.cfg.limit_frames = 12
    assert len(read_video(video_of(pipe(long, steps=1))).frames) == 12
    pipe.model.cfg.limit_frames = 1024
    monkeypatch.setattr(pipe.model.cfg, "max_frames", 10_000)
    assert len(read_video(video_of(pipe(long, steps=1))).frames) == 12
    assert len(read_video(video_of(pipe(inputs[STAGES[1]], steps=1))).frames) == 4


def test_limits_are_keywords_of_the_pipeline(small_model, inputs):
    limits = {"limit_pixels": 64 * 64, "limit_steps": 1}
    pipe = built(STAGES[0], small_model, steps=1, resolution=[64, 64], **limits)
    for keywords, words in (
        ({"steps": 2}, "limit_steps allows 1"),
        ({"resolution": (72, 64)}, "72x64, 4,608 pixels"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            pipe(inputs[STAGES[0]], **keywords)
    assert read_video(video_of(pipe(inputs[STAGES[0]]))).frames.shape == (4, 64, 64, 3)


# Secrets


SECRET = re.compile("passw0rd|s3cret|us3r|t0ken|anch0r")


@pytest.fixture
def address(picture, inputs, tmp_path, monkeypatch):
    """Of a server of both inputs, with a name and a password in it."""
    monkeypatch.setenv("NO_PROXY", "*")
    for stage, name in zip(STAGES, ("file.png", "file.mp4")):
        shutil.copy(inputs[stage], tmp_path / name)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield f"http://us3r:passw0rd@127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.fixture
def log(caplog):
    """Everything that is logged: of this package and of ModelScope down to the details."""
    names = ("modelscope", "modelscope_i2v")
    for name in names:
        caplog.set_level(logging.DEBUG, logger=name)
    logging.getLogger(names[0]).addHandler(caplog.handler)  # it does not hand its lines on by itself
    yield caplog
    logging.getLogger(names[0]).removeHandler(caplog.handler)


@pytest.mark.parametrize("stage, name", list(zip(STAGES, ("file.png", "file.mp4"))))
def test_an_urls_credentials_and_query_show_nowhere(pipes, inputs, address, log, capfd, stage, name):
    pipe, query = pipes[stage], "?sig=s3cret&t0ken=1#anch0r"
    result = pipe(f"{address}/{name}{query}")
    assert np.array_equal(
        read_video(video_of(result)).frames, read_video(video_of(pipe(inputs[stage]))).frames
    )
    shown = [str({key: value for key, value in result.items() if key != OutputKeys.OUTPUT_VIDEO})]
    shown.append(str(read_metadata(video_of(result))))
    names_server = b"127.0.0.1" in video_of(result)
    assert not names_server
    dead = address.rpartition(":")[0] + ":9"
    for url in (f"{address}/none{query}", f"{dead}/{name}{query}", f"ftp://us3r:passw0rd@h/{name}{query}"):
        try:
            pipe(url)
        except InvalidInputError:
            shown.append(traceback.format_exc())
    for target in (f"{address}/video.mp4{query}", f"s3://us3r:passw0rd@bucket/video.mp4{query}"):
        try:
            pipe(f"{address}/{name}{query}", output_video=target)
        except OutputError as error:
            assert "it is a URL: give a path" in str(error)
            shown.append(traceback.format_exc())
    assert len(shown) == 7 and stage in log.text
    assert not [each for each in (*shown, log.text, *capfd.readouterr()) if SECRET.search(each)]


# Records


def test_a_record_that_is_made_to_hurt_harms_nothing(pipes, inputs):
    """A file says of itself what it likes; the frames are what counts."""
    pipe, frames = pipes[STAGES[1]], moving_frames(4, 40, 64)
    ours = {"software": "modelscope_i2v 1", "stage": STAGES[0]}
    for damaged in ({"seed": "[" * 50_000}, {"seed": "9" * 5000}, {"stage": "[]"}, {"a": '"\\ud800"'}):
        result = pipe(video_bytes(frames, metadata={**ours, **damaged}), steps=1)
        assert len(read_video(video_of(result)).frames) == 4


def test_a_prompt_that_no_file_can_hold_is_refused_before_work(pipes, inputs):
    steps = []
    for text in ("a\0b", "\ud800"):
        for keywords in ({"text": text}, {"negative_prompt": text}):
            with pytest.raises(InvalidInputError, match="without null characters and halves of surrogate"):
                pipes[STAGES[1]](inputs[STAGES[1]], callback=lambda *step: steps.append(step), **keywords)
    assert not steps


@pytest.mark.skipif(os.name != "posix", reason="names of bytes are POSIX's")
def test_a_model_folder_of_any_name(small_model, inputs, tmp_path, monkeypatch):
    # Processes of tests send each other what was logged, as UTF-8, which this name is not.
    monkeypatch.setattr(logging.getLogger("modelscope"), "disabled", True)
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/mod\xffel ;$(x)")
    shutil.copytree(small_model[0], folder)
    result = pipeline(STAGES[0], model=folder, device="cpu")(inputs[STAGES[0]], steps=1)
    assert provenance.from_metadata(read_metadata(video_of(result)))["model"] == "mod?el ;$(x)"
