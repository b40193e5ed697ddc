"""One video by two processes: the same as by one, and refused where they disagree."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sample_videos import moving_frames
from torch import multiprocessing

from modelscope_i2v import ImageToVideo, VideoToVideo
from modelscope_i2v.cli import main
from modelscope_i2v.engine.spreading import joined_processes
from modelscope_i2v.errors import InvalidInputError
from modelscope_i2v.media.video import Video, read_video

ROOT = Path(__file__).resolve().parents[1]
#: Of three windows, so that one of two processes has nothing of its own at the end of a step.
LONG = {"max_frames": 8, "chunk_size": 4, "overlap_size": 1, "steps": 2, "seed": 3}
SHORT = {"max_frames": 3, "steps": 2, "seed": 3}
REFINED = {"max_frames": 5, "steps": 1, "seed": 3, "colour": "source"}


def images() -> list[np.ndarray]:
    return [np.full((48, 64, 3), value, np.uint8) for value in (20, 230)]


def made(first: ImageToVideo, second: VideoToVideo) -> dict[str, np.ndarray]:
    """Videos of both stages, by the windows, the branches, and the frames that are decoded."""
    video = Video(moving_frames(5, 40, 64), 8)
    return {
        "long": first(images()[0], **LONG).frames,
        "short": first(images()[0], **SHORT).frames,
        "refined": second(video, **REFINED).frames,
    }


def process(rank: int, port: int, folders: tuple[str, str], output: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    stages = ImageToVideo.load(folders[0], "cpu"), VideoToVideo.load(folders[1], "cpu")
    with joined_processes() as spread:
        assert (spread.rank, spread.count) == (rank, 2)
        for stage in stages:
            stage.spread = spread
        np.savez(f"{output}/{rank}.npz", **made(*stages))
        for image, keywords in ((images()[rank], SHORT), (images()[0], {**SHORT, "steps": 2 + rank})):
            with pytest.raises(
                InvalidInputError, match="process 1 was given another input or other keywords"
            ):
                stages[0](image, **keywords)
        seeds = [None, None]
        seeds[rank] = stages[0](images()[0], max_frames=2, steps=1, seed=rank).record["seed"]
        assert seeds[rank] == 0  # the first's


@pytest.mark.slow
def test_two_processes_make_the_video_of_one(small_model, tmp_path):
    folders = str(small_model[0]), str(small_model[1])
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    multiprocessing.spawn(process, (port, folders, str(tmp_path)), nprocs=2)
    whole = made(ImageToVideo.load(folders[0], "cpu"), VideoToVideo.load(folders[1], "cpu"))
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as arrays:
            assert set(arrays.files) == set(whole)
            for name, frames in whole.items():
                assert arrays[name].shape == frames.shape
                # Rounding: of branches together or apart, and of one frame decoded or several.
                assert np.abs(arrays[name].astype(int) - frames).max() <= 1, name


@pytest.mark.slow
def test_the_command_line_by_torchrun(small_model, picture, tmp_path, capsys):
    options = [
        "--model",
        str(small_model[0]),
        "--refine",
        str(small_model[1]),
        "--device",
        "cpu",
        "--seed",
        "4",
    ]
    options += ["--frames", "6", "--chunk-size", "4", "--steps", "1", "--refine-steps", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "modelscope_i2v", "generate", str(picture), "-o", str(tmp_path / "two.mp4"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two.mp4: 6 frames of 128x80") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["two.mp4"]
    assert main(["generate", str(picture), "-o", str(tmp_path / "one.mp4"), *options]) == 0
    two, one = (read_video(tmp_path / name).frames.astype(int) for name in ("two.mp4", "one.mp4"))
    assert np.abs(two - one).mean() < 0.5
