"""The demo: both stages with the small model that ships, and what it says."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from modelscope.pipelines import pipeline
from PIL import Image

from modelscope_i2v import metrics
from modelscope_i2v.cli import demo, main
from modelscope_i2v.media.video import read_video
from modelscope_i2v.training.scenes import draw

pytestmark = pytest.mark.slow  # as a whole: left out of the fast loop


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_demo_makes_both_videos_and_a_sheet(capsys):
    assert main(["demo", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    picture = np.asarray(Image.open(demo.EXAMPLE_IMAGE).convert("RGB").resize((160, 96), Image.BOX))
    first, second = read_video("i2v_output.mp4"), read_video("v2v_output.mp4")
    assert first.frames.shape == (8, 96, 160, 3) and second.frames.shape == (8, 192, 320, 3)
    assert first.metadata["seed"] == second.metadata["seed"] == "3"
    assert metrics.block_psnr(first.frames[:1], picture[None]) > 19
    assert metrics.motion_ratio(first.frames) > 2.2
    enlarged = np.stack([np.asarray(Image.fromarray(f).resize((320, 192))) for f in first.frames])
    assert metrics.sharpness(second.frames) > metrics.sharpness(enlarged)
    assert Image.open("demo.png").width > 640
    for words in ("i2v_output.mp4, 8 frames", "v2v_output.mp4, 8 frames", "motion ratio", "photograph"):
        assert words in captured.out
    for model in ("damo/Image-to-Video", "damo/Video-to-Video"):
        assert f"modelscope download --model {model} --revision v1.1.0" in captured.out


def test_another_picture_gives_another_video_in_its_folder(capsys):
    Image.fromarray(draw(1_000_001, frames=1, size=(320, 200))[0][0]).save("my picture.png")
    assert main(["demo", "my picture.png", "-o", "new/folder"]) == 0
    assert sorted(path.name for path in Path("new/folder").iterdir()) == [
        "demo.png", "i2v_output.mp4", "v2v_output.mp4",
    ]  # fmt: skip


def test_its_model_is_one_for_either_task(capsys):
    assert main(["demo", "--print-model"]) == 0
    folder = capsys.readouterr().out.strip()
    pipe = pipeline(task="image-to-video", model=folder, device="cpu")
    result = pipe(str(demo.EXAMPLE_IMAGE), output_video="first.mp4")
    pipe = pipeline(task="video-to-video", model=folder, device="cpu")
    pipe({"video_path": result["output_video"]}, output_video="second.mp4")
    assert read_video("second.mp4").frames.shape == (8, 192, 320, 3)


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["missing.png"], "'missing.png'", 2),
        (["text.png"], "it seems to be a text", 2),
        (["."], "is a folder", 2),
        (["-o", "text.png"], "text.png/i2v_output.mp4", 1),
        (["--seed", "1.5"], "--seed: invalid int value: '1.5'", 2),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(arguments, words, code, capsys):
    Path("text.png").write_text("not an image")
    assert main(["demo", *arguments]) == code
    assert words in capsys.readouterr().err
    assert [path.name for path in Path.cwd().iterdir()] == ["text.png"]


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_it_shares_the_cores(given, monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main(["demo", "missing.png"]) == 2
    assert os.environ.get("OMP_WAIT_POLICY") == given  # torch is loaded: too late to say
    monkeypatch.delitem(sys.modules, "torch")
    assert main(["demo", "missing.png"]) == 2
    assert os.environ["OMP_WAIT_POLICY"] == (given or "PASSIVE")
