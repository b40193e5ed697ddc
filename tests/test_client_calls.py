"""Calls as they stand in public client code, beyond the model cards' own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from modelscope.preprocessors import Preprocessor
from PIL import Image
from stage_pipelines import STAGES, video_of

from modelscope_i2v.errors import InvalidInputError
from modelscope_i2v.plugin.models import ImageToVideoModel, VideoToVideoModel
from modelscope_i2v.plugin.pipelines import ImageToVideoPipeline, VideoToVideoPipeline

STOCK_PATHS = {
    "modelscope.pipelines.multi_modal.image_to_video_pipeline.ImageToVideoPipeline": ImageToVideoPipeline,
    "modelscope.pipelines.multi_modal.video_to_video_pipeline.VideoToVideoPipeline": VideoToVideoPipeline,
    "modelscope.models.multi_modal.image_to_video.image_to_video_model.ImageToVideo": ImageToVideoModel,
    "modelscope.models.multi_modal.video_to_video.video_to_video_model.VideoToVideo": VideoToVideoModel,
    # ModelScope's own lazy attributes of packages
    "modelscope.models.multi_modal.image_to_video.ImageToVideo": ImageToVideoModel,
    "modelscope.models.multi_modal.video_to_video.VideoToVideo": VideoToVideoModel,
}


# The stock classes by their paths


@pytest.mark.parametrize("path", STOCK_PATHS)
def test_stock_paths_give_our_classes(path):
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is STOCK_PATHS[path]


def test_a_pipeline_built_by_its_class(small_model, pipes, inputs):
    from modelscope.pipelines.multi_modal.image_to_video_pipeline import ImageToVideoPipeline

    pipe = ImageToVideoPipeline(str(small_model[0]), device="cpu", steps=1)
    assert video_of(pipe(inputs[STAGES[0]])) == video_of(pipes[STAGES[0]](inputs[STAGES[0]]))


def test_stock_modules_that_were_imported_before():
    """Also under the names that their packages keep: those are what ``from package import module`` reads."""
    code = f"""
import sys, types
sys.path.insert(0, {str(ROOT)!r})
sys.modules["cv2"] = types.ModuleType("cv2")
import modelscope.models.multi_modal.video_to_video as package
from modelscope.pipelines.multi_modal import video_to_video_pipeline as stock
package.VideoToVideo = "the shipped class"
sys.modules[package.__name__ + ".video_to_video_model"] = types.ModuleType("shipped")
import modelscope_i2v
from modelscope.pipelines.multi_modal import video_to_video_pipeline as ours
from modelscope.models.multi_modal.video_to_video import VideoToVideo
assert stock.VideoToVideoPipeline.__module__ == stock.__name__, stock
print(ours.VideoToVideoPipeline, VideoToVideo)
"""
    environment = {**os.environ, "MODELSCOPE_I2V_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [f"{VideoToVideoPipeline} {VideoToVideoModel}"], done.stderr


# Preprocessors by themselves, and rows of data sets


def test_stage_twos_preprocessor_takes_the_pipelines_input(small_model, inputs):
    preprocess = Preprocessor.from_pretrained(str(small_model[1]))
    path = inputs[STAGES[1]]
    prepared = preprocess({"video_path": path, "text": "a boat", "total_noise_levels": 500, "scene": 7})
    alone = preprocess(path)
    assert torch.equal(prepared.pop("video_data"), alone["video_data"])
    assert {**alone, **prepared} == {**alone, "text": "a boat", "total_noise_levels": 500}
    with pytest.raises(InvalidInputError, match="the input needs the key 'video_path', got text"):
        preprocess({"text": "a boat"})


def test_stage_one_takes_a_data_sets_row(small_model, pipes, inputs):
    path = inputs[STAGES[0]]
    row = {"image": Image.open(path), "label": 3}
    preprocess = Preprocessor.from_pretrained(str(small_model[0]))
    assert torch.equal(preprocess(row)["vit_frame"], preprocess(path)["vit_frame"])
    assert video_of(pipes[STAGES[0]](row)) == video_of(pipes[STAGES[0]](path))
    with pytest.raises(InvalidInputError, match="the input needs the key 'image', got label"):
        pipes[STAGES[0]]({"label": 3})
