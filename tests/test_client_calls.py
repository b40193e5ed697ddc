"""Calls as they stand in public client code, beyond the model cards' own."""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from modelscope.outputs import OutputKeys
from modelscope.preprocessors import Preprocessor
from modelscope.utils.input_output import (
    PipelineInfomation,
    call_pipeline_with_json,
    get_pipeline_information_by_pipeline,
    pipeline_output_to_service_base64_output,
)
from PIL import Image
from stage_pipelines import STAGES, built, video_of

from modelscope_i2v.engine.progress import Progress
from modelscope_i2v.errors import Interrupted, InvalidInputError, OutputError
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


@pytest.mark.slow
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


def test_what_stage_twos_preprocessor_gives_is_what_the_model_and_forward_take(small_model, pipes, inputs):
    pipe, data = pipes[STAGES[1]], {"video_path": inputs[STAGES[1]], "text": "a boat"}
    prepared = Preprocessor.from_pretrained(str(small_model[1]))(data)
    expected = video_of(pipe(data))
    assert video_of(pipe.postprocess(pipe.forward(prepared))) == expected
    assert not torch.equal(pipe.model(prepared), pipe.model({**prepared, "text": "a car"}))


def test_stage_one_takes_a_data_sets_row(small_model, pipes, inputs):
    path = inputs[STAGES[0]]
    row = {"image": Image.open(path), "label": 3}
    preprocess = Preprocessor.from_pretrained(str(small_model[0]))
    assert torch.equal(preprocess(row)["vit_frame"], preprocess(path)["vit_frame"])
    assert video_of(pipes[STAGES[0]](row)) == video_of(pipes[STAGES[0]](path))
    with pytest.raises(InvalidInputError, match="the input needs the key 'image', got label"):
        pipes[STAGES[0]]({"label": 3})


# Devices and the working directory, whatever a caller does with them


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("device", ["cpu", "gpu:0", torch.device("cuda", 0)])
def test_a_device_is_whatever_a_caller_assigns(stage, device, pipes, inputs):
    """The parts work where they are, as when they are moved by hand."""
    pipe = pipes[stage]
    expected = video_of(pipe(inputs[stage]))
    before = pipe.device, pipe.model.device
    try:
        pipe.device = pipe.model.device = device
        pipe.model.clip_encoder.device = "cpu"
        pipe.model.clip_encoder.model.to("cpu")
        pipe.model.generator.to("cpu")
        assert isinstance(pipe.model.device, torch.device)
        assert video_of(pipe(inputs[stage])) == expected
    finally:
        pipe.device, pipe.model.device = before


def test_a_device_that_torch_does_not_know(pipes):
    pipe = pipes[STAGES[0]]
    with pytest.raises(InvalidInputError, match="device: got 'quantum', allowed are cpu, cuda"):
        pipe.model.device = "quantum"


@pytest.mark.parametrize("stage", STAGES)
def test_a_callback_that_changes_the_directory(stage, pipes, inputs, tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = pipes[stage](
        inputs[stage], output_video="./video.mp4", callback=lambda *step: os.chdir(tmp_path / "there")
    )
    assert result[OutputKeys.OUTPUT_VIDEO] == "./video.mp4"
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.mp4")] == ["here/video.mp4"]


# ModelScope's service


@pytest.mark.parametrize("stage", STAGES)
def test_modelscopes_service(stage, pipes, inputs):
    pipe, file = pipes[stage], Path(inputs[stage]).read_bytes()
    information = get_pipeline_information_by_pipeline(pipe)
    by_hand = PipelineInfomation(stage, type(pipe).__name__, inspect.getfile(type(pipe)))
    assert information.schema == by_hand.schema
    if stage == STAGES[0]:
        sent, direct = {"image": base64.urlsafe_b64encode(file).decode()}, file
        types = {"image": "string"}
    else:
        prompts = {"text": "a boat", "positive_prompt": ", sharp", "negative_prompt": "a car"}
        more = {**prompts, "total_noise_levels": 400}
        sent = {"video_path": base64.b64encode(file).decode(), **more}
        direct = {"video_path": file, **more}
        types = {"video_path": "string", **dict.fromkeys(prompts, "string"), "total_noise_levels": "integer"}
    schema = information.schema
    assert {key: value["type"] for key, value in schema["input"]["properties"].items()} == types
    assert (schema["parameters"], list(schema["output"]["properties"])) == ({}, ["output_video"])

    result = call_pipeline_with_json(information, pipe, {"input": sent, "parameters": {"seed": 3}})
    answer = json.loads(json.dumps(pipeline_output_to_service_base64_output(stage, result)))
    assert base64.b64decode(answer["output_video"]) == video_of(pipe(direct, seed=3))
    assert answer["seed"] == 3


# Several inputs


@pytest.mark.parametrize("several", [list, tuple, iter, lambda items: (item for item in items)])
def test_several_inputs_give_what_single_calls_give(several, pipes, inputs, tmp_path):
    pipe, path = pipes[STAGES[0]], inputs[STAGES[0]]
    flipped = Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    names = [str(tmp_path / "0.mp4"), str(tmp_path / "1.mp4")]
    results = pipe(several([path, flipped]), output_video=tuple(names), batch_size=2)
    assert [result[OutputKeys.OUTPUT_VIDEO] for result in results] == names
    singles = [video_of(pipe(item)) for item in (path, flipped)]
    assert [video_of(result) for result in results] == singles and singles[0] != singles[1]


def test_an_open_file_is_no_iterator_of_inputs(pipes, inputs):
    with open(inputs[STAGES[0]], "rb") as file, pytest.raises(InvalidInputError, match="BufferedReader"):
        pipes[STAGES[0]](file)


@pytest.mark.parametrize("refine", [False, True])
def test_one_name_for_two_videos_is_refused_before_any_work(refine, both, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked.mp4").symlink_to(tmp_path / "video.mp4")
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    steps, picture = [], inputs[STAGES[0]]
    for other in ("video.mp4", "./video.mp4", str(tmp_path / "video.mp4"), "linked.mp4", "folder/video.mp4"):
        with pytest.raises(InvalidInputError, match="video.mp4' are one file"):
            both(
                [picture] * 3,
                output_video=["video.mp4", "else.mp4", other],
                refine=refine,
                callback=lambda *step: steps.append(step),
            )
    assert not steps and not (tmp_path / "video.mp4").exists()


# Both stages in one call


@pytest.fixture(scope="module")
def both(small_model):
    """Stage one's pipeline with stage two for ``refine=True``."""
    return built(STAGES[0], small_model, steps=1, refine=str(small_model[1]))


def test_each_first_video_of_a_list_has_a_file(both, inputs, tmp_path):
    picture = inputs[STAGES[0]]
    flipped = Image.open(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    keywords = {"refine": True, "refine_steps": 1, "resolution": [64, 64]}
    beside = both(
        (picture, flipped),
        output_video=[str(tmp_path / "0.mp4"), str(tmp_path / "1.mp4")],
        keep_first=True,
        **keywords,
    )
    named = both((picture, flipped), keep_first=[str(tmp_path / "a.mp4"), tmp_path / "b.mov"], **keywords)
    in_memory = both((picture, flipped), keep_first=True, **keywords)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.i2v.mp4", "0.mp4", "1.i2v.mp4", "1.mp4", "a.mp4", "b.mov"
    ]  # fmt: skip
    for index, result in enumerate(beside):
        assert result["first_video"] == str(tmp_path / f"{index}.i2v.mp4")
        assert Path(result["first_video"]).read_bytes() == in_memory[index]["first_video"]
    assert named[0]["first_video"] == str(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == in_memory[0]["first_video"] != in_memory[1]["first_video"]


@pytest.mark.parametrize(
    ("names", "keep_first", "message"),
    [
        (["0.mp4", "0.mov"], True, "'0.i2v.mp4' and '0.i2v.mp4' are one file"),
        (["0.mp4", "0.i2v.mp4"], True, "are one file"),
        (["0.mp4", "1.mp4"], "first.mp4", "keep_first: for a list of 2 inputs True or a list of 2 paths"),
        (["0.mp4", "1.mp4"], ["first.mp4", "nowhere.txt"], "nowhere.txt"),
        (None, ["a.mp4", "a.mp4"], "'a.mp4' and 'a.mp4' are one file"),
        (["0.mp4", "1.txt"], False, "1.txt"),
    ],
)
def test_first_videos_names_are_checked_before_any_work(
    names, keep_first, message, both, inputs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    steps = []
    with pytest.raises((InvalidInputError, OutputError), match=message):
        both(
            [inputs[STAGES[0]]] * 2,
            output_video=names,
            keep_first=keep_first,
            refine=True,
            callback=lambda *step: steps.append(step),
        )
    assert not steps and not list(tmp_path.iterdir())


# Ending a call, and seeing how far it is


@pytest.mark.parametrize("stage", STAGES)
def test_stop_iteration_cancels(stage, pipes, inputs, tmp_path):
    def stop(step, t, latents):
        steps.append(step)
        raise StopIteration

    steps, pipe, path = [], pipes[stage], tmp_path / "video.mp4"
    with pytest.raises(Interrupted, match=f"{stage}: cancelled after step 1 of 3"):
        pipe(inputs[stage], steps=3, output_video=str(path), callback=stop)
    assert steps == [0] and not path.exists()
    assert video_of(pipe(inputs[stage])) == video_of(pipe(inputs[stage], callback=lambda *step: None))


@pytest.mark.parametrize("notebook", [False, True])
def test_a_bar_shows_in_a_notebook(notebook, capfd, monkeypatch):
    """Whose output is no terminal, by what IPython says of itself."""
    shell = types.SimpleNamespace(kernel=object()) if notebook else None
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    with Progress().steps("image-to-video", 2) as after_step:
        after_step(0, 1.0, torch.zeros(1))
        after_step(1, 0.0, torch.zeros(1))
    assert ("image-to-video: 100%|" in capfd.readouterr().err) is notebook
