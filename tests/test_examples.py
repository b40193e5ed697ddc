"""The scripts in ``examples/`` run as they are, on the tiny model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from sample_videos import moving_frames

from modelscope_i2v.media.video import read_video, write_video

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path, picture, capsys):
    """Run an example in an empty folder; the frames of its output, and what it printed."""

    def run(name: str, *arguments: object) -> tuple[np.ndarray, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return read_video(tmp_path / "video.mp4").frames, capsys.readouterr().out

    return run


def test_image_to_video(run, picture, small_model):
    frames, printed = run("image_to_video.py", picture, "video.mp4", small_model[0])
    assert frames.shape == (4, 64, 128, 3)
    assert "video.mp4 was made with seed 1" in printed


def test_both_stages(run, picture, small_model, tmp_path):
    frames, _ = run("both_stages.py", picture, "video.mp4", *small_model)
    assert frames.shape == (4, 80, 128, 3)
    names = {path.name for path in (tmp_path / "previews").iterdir()}
    assert names == {"seed_1.mp4", "seed_2.mp4", "contact_sheet.png"}


def test_without_modelscope(run, picture, small_model):
    frames, printed = run("without_modelscope.py", small_model[0], picture, "video.mp4")
    assert frames.shape == (4, 64, 128, 3)
    assert printed.splitlines() == ["step 1", "step 2", "(4, 64, 128, 3) uint8 8 frames a second, 2 steps"]


def test_enhance(run, small_model, tmp_path):
    write_video(moving_frames(3, 40, 64), tmp_path / "in.mp4", 25)
    frames, printed = run("enhance.py", "in.mp4", "video.mp4", small_model[1])
    assert frames.shape == (3, 80, 128, 3)
    assert "3 frames of 128x80 at 25 fps, 1 scenes" in printed


def test_low_memory(run, picture, small_model):
    frames, printed = run("low_memory.py", picture, "video.mp4", small_model[0])
    assert frames.shape == (4, 64, 128, 3) and printed.strip() == "video.mp4"


@pytest.mark.slow
def test_train(run, picture, small_model, tmp_path):
    (tmp_path / "clips").mkdir()
    write_video(moving_frames(8, 64, 128), tmp_path / "clips" / "a.mp4", 8)
    frames, printed = run("train.py", "clips", picture, "video.mp4", small_model[0], 2)
    assert frames.shape == (4, 64, 128, 3) and "video.mp4 was made with run" in printed


def test_each_example_has_a_test():
    tested = {name[len("test_") :] for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested
