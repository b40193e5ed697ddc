"""The engine: stages in plain Python, without ModelScope."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from stage_pipelines import video_of

from modelscope_i2v import ImageToVideo, TwoStages, VideoToVideo
from modelscope_i2v.errors import ConfigurationError, Interrupted, InvalidInputError
from modelscope_i2v.media.video import read_metadata
from modelscope_i2v.settings.record import from_metadata


@pytest.fixture(scope="module")
def stages(small_model) -> TwoStages:
    return TwoStages.load(*small_model, device="cpu")


def test_a_stage_gives_what_its_pipeline_gives(stages, i2v, v2v, picture):
    first = stages.first(str(picture), seed=3)
    assert first.to_bytes() == video_of(i2v(str(picture), seed=3))
    second = stages.second(first, seed=4, text="a cat")
    assert second.to_bytes() == video_of(v2v({"video_path": first, "text": "a cat"}, seed=4))
    assert second.record["first_stage"] == from_metadata(first.metadata)
    assert list(second.seconds) == ["clip", "encoding", "denoising", "decoding"]


def test_both_stages_are_a_preview_and_its_refinement(stages, picture, tmp_path):
    both = stages.generate(str(picture), seed=2, text="a cat", refine_steps=1)
    preview = stages.preview(str(picture), seeds=[1, 2])[1]
    assert np.array_equal(both.first.frames, preview.frames)
    refined = stages.refine(preview, seed=2, text="a cat", steps=1)
    assert np.array_equal(both.frames, refined.frames)
    path = both.save(tmp_path / "both.mp4")
    assert read_metadata(path)["text"] == "a cat"


def test_one_autoencoder_serves_both(stages):
    assert stages.first.autoencoder is stages.second.autoencoder


@pytest.mark.parametrize("stage", [ImageToVideo, VideoToVideo])
def test_settings_take_precedence_and_are_checked(stage, small_model):
    folder = small_model[stage is VideoToVideo]
    assert stage.load(folder, "cpu", steps=1).settings.steps == 1
    with pytest.raises(ConfigurationError, match="did you mean 'steps'"):
        stage.load(folder, "cpu", step=1)
    with pytest.raises(InvalidInputError, match="device: got 'gqu'"):
        stage.load(folder, "gqu")
    with pytest.raises(ConfigurationError, match="describes no second stage"):
        TwoStages.load(small_model[0])


def test_a_callback_ends_a_generation_and_the_next_is_as_ever(stages, picture):
    expected = stages.first(str(picture), seed=1).frames

    def stop(step, timestep, latents):
        raise StopIteration

    with pytest.raises(Interrupted, match="image-to-video: cancelled after step 1 of 2"):
        stages.first(str(picture), seed=1, callback=stop)
    assert np.array_equal(stages.first(str(picture), seed=1).frames, expected)


def test_frames_are_taken_one_by_one(stages):
    alive: list[weakref.ref] = []
    most = 0

    def frames():
        nonlocal most
        for index in range(6):
            frame = torch.full((3, 40, 64), index / 6)
            alive.append(weakref.ref(frame))
            most = max(most, sum(each() is not None for each in alive))
            yield frame

    request, _ = stages.second.resolve({"steps": 1, "seed": 0, "resolution": [32, 32]})
    latents = stages.second.sample(frames(), request)
    assert latents.shape[2] == 6
    assert most <= 2  # the one that is encoded, and the next


def test_no_modelscope_is_imported(small_model, picture, tmp_path):
    code = """
import sys
from modelscope_i2v import TwoStages
stages = TwoStages.load(sys.argv[1], sys.argv[2], device="cpu", steps=1)
stages.generate(sys.argv[3]).save(sys.argv[4])
print([name for name in sys.modules if name.split(".")[0] == "modelscope"])
"""
    arguments = [*map(str, small_model), str(picture), str(tmp_path / "both.mp4")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert Path(arguments[-1]).stat().st_size > 0
