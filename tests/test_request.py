"""Requests: which of keyword, file and reference value a generation uses, and its seed."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelscope_i2v.errors import InvalidInputError
from modelscope_i2v.settings.configuration import load_settings
from modelscope_i2v.settings.keywords import check_keywords, keywords_of
from modelscope_i2v.settings.request import Request, computed_settings
from modelscope_i2v.settings.stages import (
    DEFAULT_NEGATIVE_PROMPT,
    DEFAULT_POSITIVE_PROMPT,
    ImageToVideoSettings,
    StageSettings,
    VideoToVideoSettings,
)

ROOT = Path(__file__).resolve().parents[1]
ONE, TWO = "image-to-video", "video-to-video"
SETTINGS = {ONE: ImageToVideoSettings, TWO: VideoToVideoSettings}


def requested(settings: StageSettings, **keywords: Any) -> Request:
    return Request.resolve(settings, check_keywords(settings.stage, keywords))


def of_file(folder: Path, stage: str, **settings: Any) -> StageSettings:
    contents = {"task": stage, "model": {"model_cfg": settings}}
    (folder / "configuration.json").write_text(json.dumps(contents), encoding="utf-8")
    return load_settings(folder, stage)


# Precedence


def test_reference_values():
    one, two = (Request.resolve(settings(seed=5)) for settings in SETTINGS.values())
    assert one == Request(
        stage=ONE, seed=5, steps=50, guide_scale=3.0, size=(448, 256), fps=8, frames=32, window=32, overlap=8,
        noise_strength=0.1, solver="ddim",
    )  # fmt: skip
    assert one.mode == two.mode == "exact"
    assert two == Request(
        stage=TWO, seed=5, steps=30, guide_scale=7.5, size=(1280, 720), fps=8, frames=32, window=32,
        overlap=8, guide_rescale=0.2, total_noise_levels=600, solver_mode="fast", text="",
        positive_prompt=DEFAULT_POSITIVE_PROMPT, negative_prompt=DEFAULT_NEGATIVE_PROMPT,
    )  # fmt: skip


@pytest.mark.parametrize(
    "stage, keywords, mode",
    [
        (ONE, {}, "exact"),
        (ONE, {"solver": "ddim", "reuse_interval": 1, "steps": 10}, "exact"),
        (ONE, {"solver": "dpmpp"}, "approximate: solver dpmpp"),
        (TWO, {"guidance_interval": [0, 500]}, "approximate: guidance_interval 0-500"),
        (TWO, {"reuse_interval": 3}, "approximate: reuse_interval 3"),
        (
            ONE,
            {"reuse_interval": 2, "solver": "dpmpp", "guidance_interval": [5, 999]},
            "approximate: solver dpmpp, guidance_interval 5-999, reuse_interval 2",
        ),
    ],
)
def test_the_mode_names_every_approximation(stage, keywords, mode):
    assert Request.resolve(SETTINGS[stage](), check_keywords(stage, keywords)).mode == mode


def test_a_scale_is_of_the_source_and_makes_even_sides():
    request = requested(SETTINGS[TWO](), scale=2)
    assert request.scaled((320, 181)).size == (640, 362)
    assert request.scaled((320, 181)) == dataclasses.replace(request, size=(640, 362), scale=None)
    assert requested(SETTINGS[TWO](scale=2.0), resolution=[64, 80]).scaled((9, 9)).size == (64, 80)
    with pytest.raises(InvalidInputError, match="scale and resolution both say"):
        requested(SETTINGS[TWO](), scale=2, resolution=[64, 80])


def test_a_tile_must_be_larger_than_its_overlap():
    with pytest.raises(InvalidInputError, match="tile_overlap: got 128, allowed is less than the 128 pixels"):
        requested(SETTINGS[TWO](), tile_size=128, tile_overlap=128)


def test_what_is_quiet_is_named_only_where_it_was_asked_for():
    base = requested(SETTINGS[TWO](seed=3))
    asked = {"keep_audio": True, "tile_size": 256, "colour": "source"}
    request = requested(SETTINGS[TWO](seed=3), **asked)
    assert request.keywords().keys() - base.keywords().keys() == asked.keys()
    assert requested(SETTINGS[TWO](seed=3), codec="h264", scene_cuts=False).keywords() == base.keywords()
    assert Request.from_json(request.to_json()) == request


#: By keyword: the stage, what the file says, what the call says, and the request's field.
PRECEDENCE = [
    (ONE, "seed", 1, 0, "seed"),
    (ONE, "steps", 10, 20, "steps"),
    (ONE, "guide_scale", 2.0, 0.0, "guide_scale"),
    (ONE, "noise_strength", 0.5, 0.0, "noise_strength"),
    (ONE, "max_frames", 10, 20, "frames"),
    (ONE, "target_fps", 10, 20, "fps"),
    (ONE, "solver", "dpmpp", "ddim", "solver"),
    (ONE, "reuse_interval", 3, 2, "reuse_interval"),
    (TWO, "guidance_interval", (0, 500), (100, 400), "guidance_interval"),
    (TWO, "guide_rescale", 0.5, 0.0, "guide_rescale"),
    (TWO, "total_noise_levels", 100, 200, "total_noise_levels"),
    (TWO, "solver_mode", "normal", "fast", "solver_mode"),
    (TWO, "positive_prompt", "file", "", "positive_prompt"),
    (TWO, "negative_prompt", "file", "", "negative_prompt"),
    (TWO, "resolution", (64, 32), (128, 96), "size"),
    (TWO, "positive_prompt", ", sharp", "", "prompt"),
]


@pytest.mark.parametrize("stage, name, in_file, in_call, field", PRECEDENCE)
def test_call_goes_before_file_and_file_before_reference(tmp_path, stage, name, in_file, in_call, field):
    reference = getattr(requested(SETTINGS[stage](seed=7)), field)
    settings = of_file(tmp_path, stage, **{"seed": 7, name: in_file})
    assert getattr(requested(settings), field) == in_file != reference
    assert getattr(requested(settings, **{name: in_call}), field) == in_call
    assert getattr(requested(settings, **{name: None}), field) == in_file
    assert getattr(requested(settings), field) == in_file  # the settings are as they were


def test_frame_rate_has_two_names():
    settings = ImageToVideoSettings(target_fps=12)
    assert requested(settings, fps=24).fps == requested(settings, target_fps=24).fps == 24
    assert requested(settings, fps=None).fps == 12


def test_none_is_not_given():
    assert check_keywords(TWO, dict.fromkeys(keywords_of(TWO))) == {}
    settings = VideoToVideoSettings(seed=3)
    assert requested(settings, **dict.fromkeys(keywords_of(TWO))) == requested(settings)


def test_assigned_settings_count():
    settings = VideoToVideoSettings(seed=3)
    settings.max_frames = 10_000
    settings.positive_prompt = ", sharp"
    settings.latent_wid, settings.latent_hei = 40, 24
    request = requested(settings, text="a cat")
    assert (request.frames, request.window, request.overlap) == (10_000, 10_000, 2_500)
    assert (request.prompt, request.size) == ("a cat, sharp", (320, 192))


@pytest.mark.parametrize(
    "stage, settings, keywords, steps",
    [
        (ONE, {}, {}, 50),
        (TWO, {}, {}, 30),
        (TWO, {"solver_mode": "normal"}, {}, 50),
        (TWO, {}, {"solver_mode": "normal"}, 50),
        (TWO, {"solver_mode": "normal"}, {"solver_mode": "fast"}, 30),
        (TWO, {"solver_mode": "normal", "steps": 7}, {}, 7),
        (TWO, {"steps": 7}, {"solver_mode": "normal"}, 7),
        (TWO, {"steps": 7}, {"solver_mode": "normal", "steps": 9}, 9),
        (ONE, {}, {"steps": 1}, 1),
        (ONE, {}, {"solver": "dpmpp"}, 25),
        (ONE, {"solver": "dpmpp"}, {}, 25),
        (ONE, {"steps": 40}, {"solver": "dpmpp"}, 40),
    ],
)
def test_steps_are_the_solvers_unless_given(stage, settings, keywords, steps):
    assert requested(SETTINGS[stage](**settings), **keywords).steps == steps


def test_request_is_what_is_computed_and_nothing_else():
    keywords = check_keywords(ONE, {"callback": print, "progress": False, "generator": torch.Generator()})
    assert Request.resolve(ImageToVideoSettings(), keywords).seed >= 0
    named = {"stage"}.union(*(computed_settings(stage) for stage in SETTINGS))
    assert named == {field.name for field in dataclasses.fields(Request)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        requested(ImageToVideoSettings()).steps = 3


def test_declarations_are_read_without_torch():
    code = "import sys; import modelscope_i2v.settings.request, modelscope_i2v.settings.keywords; "
    code += "sys.exit(bool({'torch', 'numpy', 'open_clip', 'modelscope'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# As text

ALL = {
    ONE: {
        "seed": 2**63 - 1, "steps": 7, "guide_scale": 0.1 + 0.2, "noise_strength": 1 / 3, "max_frames": 1,
        "resolution": [8, 8192], "fps": 240, "solver": "dpmpp", "guidance_interval": [0, 999],
        "reuse_interval": 3,
    },
    TWO: {
        "seed": 0, "text": 'a "cat"\n图', "positive_prompt": "", "negative_prompt": "3", "chunk_size": 24,
        "overlap_size": 0, "total_noise_levels": 1, "solver_mode": "normal", "guide_rescale": 1e-300,
    },
}  # fmt: skip


@pytest.mark.parametrize("stage", SETTINGS)
@pytest.mark.parametrize("keywords", [{}, ALL], ids=["reference", "all"])
def test_text_of_a_request_gives_it_back(stage, keywords):
    request = requested(SETTINGS[stage](), **keywords.get(stage, {}))
    text = request.to_json()
    again = Request.from_json(text)
    assert again == request and hash(again) == hash(request)
    assert Request.from_json(json.dumps(json.loads(text))) == request
    # The keywords make it, whatever the settings are.
    other = SETTINGS[stage](max_frames=5, guide_scale=1, seed=3, resolution=[64, 64])
    assert requested(other, **request.keywords()) == request


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", "request: is not a JSON object: "),
        ("{", "request: is not a JSON object: Expecting"),
        ("[" * 100_000, "request: is not a JSON object: "),
        ('{"stage": "image-to-video", "seed": 1, "seed": 2}', "request: .* the key 'seed' stands twice"),
        (
            '{"stage": ["image-to-video"]}',
            "stage: got .'image-to-video'., allowed is one of image-to-video, ",
        ),
        ('{"stage": "image-to-video", "guide_scale": NaN}', "guide_scale: got nan, allowed is a number from"),
        ('{"stage": "image-to-video", "callback": "x"}', "callback: got 'x', allowed is a function"),
        ('{"stage": "image-to-video", "text": ""}', "image-to-video has no keyword 'text'"),
        ('{"stage": "image-to-video", "overlap_size": 32}', "overlap_size: got 32, allowed is less than"),
    ],
)
def test_text_that_is_no_request_is_refused(text, message):
    with pytest.raises(InvalidInputError, match=f"^{message}"):
        Request.from_json(text)


# Windows


@pytest.mark.parametrize(
    "keywords, window, overlap",
    [
        ({}, 32, 8),
        ({"chunk_size": 24}, 24, 6),
        ({"chunk_size": 24, "overlap_size": 8}, 24, 8),
        ({"overlap_size": 0}, 32, 0),
        ({"overlap_size": 31}, 32, 31),
        ({"max_frames": 10}, 10, 2),
        ({"max_frames": 100, "chunk_size": 16}, 16, 4),
        ({"max_frames": 1}, 1, 0),
    ],
)
def test_windows(keywords, window, overlap):
    request = requested(VideoToVideoSettings(), **keywords)
    assert (request.window, request.overlap) == (window, overlap)
    assert request.frames == keywords.get("max_frames", 32)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"chunk_size": 24, "overlap_size": 24}, "got 24, allowed is less than the 24 frames of a chunk"),
        ({"overlap_size": 40}, "got 40, allowed is less than the 32 frames of a chunk"),
        ({"max_frames": 4, "overlap_size": 8}, "got 8, allowed is less than the 4 frames of a chunk"),
    ],
)
def test_overlap_of_a_whole_chunk_is_refused(keywords, message):
    with pytest.raises(InvalidInputError) as refusal:
        requested(VideoToVideoSettings(), **keywords)
    assert str(refusal.value) == f"overlap_size: {message}"


# Seeds


def test_absent_seed_is_random_and_no_global_draw():
    seeds = set()
    for _ in range(4):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        seeds.add(requested(ImageToVideoSettings()).seed)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])
        assert random.getstate() == states[2]
    assert len(seeds) == 4
    assert all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)


def test_generator_gives_a_seed_that_reproduces_and_advances():
    settings = ImageToVideoSettings(seed=666)
    generator = torch.Generator().manual_seed(4)
    first, second = (requested(settings, generator=generator).seed for _ in range(2))
    assert first != second
    assert 666 not in (first, second)
    again = torch.Generator().manual_seed(4)
    assert [requested(settings, generator=again).seed for _ in range(2)] == [first, second]
    assert requested(settings, seed=first) == requested(settings, generator=torch.Generator().manual_seed(4))
    keywords = check_keywords(ONE, {"generator": again, "steps": 3})
    Request.resolve(settings, keywords)
    assert keywords.keys() == {"generator", "steps"}


def test_seed_goes_before_a_generator():
    generator = torch.Generator().manual_seed(4)
    state = generator.get_state()
    assert requested(ImageToVideoSettings(), generator=generator, seed=0).seed == 0
    assert torch.equal(generator.get_state(), state)
