"""Model folders as their users have them: edited, converted to safetensors, incomplete."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from modelscope.outputs import OutputKeys
from modelscope.pipelines import pipeline
from safetensors.torch import save_file
from sample_videos import moving_frames

from modelscope_i2v.media.video import read_video, write_video
from modelscope_i2v.weights import open_checkpoint

STAGES = ("image-to-video", "video-to-video")


@pytest.fixture
def folder_of(small_model, tmp_path):
    """A copy of a stage's model folder, whose weights are links, with edits to its configuration."""

    def make(stage: str = STAGES[0], model_args=(), model_cfg=()) -> Path:
        source, folder = small_model[STAGES.index(stage)], tmp_path / stage
        shutil.copytree(source, folder, copy_function=os.symlink, dirs_exist_ok=False)
        contents = json.loads((source / "configuration.json").read_text(encoding="utf-8"))
        for section, edits in (("model_args", model_args), ("model_cfg", model_cfg)):
            for name, value in dict(edits).items():  # given once: in two sections it would be an error
                for part in contents["model"].values():
                    if isinstance(part, dict):
                        part.pop(name, None)
                contents["model"][section][name] = value
        (folder / "configuration.json").unlink()
        (folder / "configuration.json").write_text(json.dumps(contents), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def clip(tmp_path) -> Path:
    write_video(moving_frames(4, 40, 64), tmp_path / "clip.mp4")
    return tmp_path / "clip.mp4"


def generate(folder: Path, source, stage: str = STAGES[0], **keywords):
    return pipeline(stage, model=str(folder), device="cpu")(source, **keywords)


@pytest.mark.parametrize("section", ["model_args", "model_cfg"])
def test_an_edited_file_takes_effect_and_is_logged(folder_of, picture, caplog, section):
    edits = {"seed": 4, "steps": 1, "resolution": [72, 64], "max_frames": 3, "target_fps": 12,
             "guide_scale": 2, "precision": "bf16"}  # fmt: skip
    folder = folder_of(**{section: edits})
    logger = logging.getLogger("modelscope")
    logger.addHandler(caplog.handler)
    try:
        result = generate(folder, str(picture))
    finally:
        logger.removeHandler(caplog.handler)
    video = read_video(result[OutputKeys.OUTPUT_VIDEO])
    assert video.frames.shape == (3, 64, 72, 3) and video.fps == 12
    assert (result["seed"], result["steps"], result["guide_scale"], result["precision"]) == (4, 1, 2, "bf16")
    line = caplog.messages[-1]
    for words in ("seed 4", "1 steps", "3 frames of 72x64", "bf16 on cpu"):
        assert words in line


def test_edited_prompts_take_effect(folder_of, small_model, clip):
    edited = folder_of(STAGES[1], model_cfg={"positive_prompt": ", a red boat", "negative_prompt": "fog"})
    plain, other = (
        generate(folder, {"video_path": str(clip)}, STAGES[1]) for folder in (small_model[1], edited)
    )
    assert (other["positive_prompt"], other["negative_prompt"]) == (", a red boat", "fog")
    assert plain[OutputKeys.OUTPUT_VIDEO] != other[OutputKeys.OUTPUT_VIDEO]


def test_a_call_goes_before_the_pipeline_and_that_before_the_file(folder_of, picture):
    folder = folder_of(model_cfg={"seed": 1, "steps": 1, "guide_scale": 4.0})
    pipe = pipeline(STAGES[0], model=str(folder), device="cpu", seed=2, steps=2, resolution=[64, 64], fps=10)
    result = pipe(str(picture), seed=3)
    assert (result["seed"], result["steps"], result["guide_scale"]) == (3, 2, 4.0)
    assert (result["resolution"], result["fps"], pipe(str(picture))["seed"]) == ((64, 64), 10, 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_safetensors_in_place_of_every_file(folder_of, small_model, picture, clip, stage):
    folder = folder_of(stage)
    for path in [*folder.glob("*.pth"), *folder.glob("*.ckpt"), *folder.glob("*.bin")]:
        with open_checkpoint(path) as checkpoint:
            tensors = {key: checkpoint.read(key) for key in checkpoint}
        path.unlink()
        save_file(tensors, path.with_suffix(".safetensors"))
    source = str(picture) if stage == STAGES[0] else str(clip)
    converted, published = (
        generate(each, source, stage)[OutputKeys.OUTPUT_VIDEO]
        for each in (folder, small_model[STAGES.index(stage)])
    )
    frames = [read_video(video).frames for video in (converted, published)]
    assert (frames[0] == frames[1]).all()


@pytest.mark.slow
def test_every_module_imports_without_optional_packages():
    code = """if True:
        import importlib, pkgutil, sys
        for name in ("xformers", "cv2", "fairscale", "rotary_embedding_torch", "imageio", "ffmpeg"):
            sys.modules[name] = None
        import modelscope_i2v
        for module in pkgutil.walk_packages(modelscope_i2v.__path__, "modelscope_i2v."):
            if module.name != "modelscope_i2v.__main__":
                importlib.import_module(module.name)
                print(module.name)
    """
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"modelscope_i2v.plugin.pipelines", "modelscope_i2v.cli.generate"} <= set(done.stdout.split())
