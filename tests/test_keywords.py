"""Keywords of a call: which are known, which are refused, ignored or sorted to a stage, and their values."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from test_configuration import TABLE

from modelscope_i2v.errors import InvalidInputError
from modelscope_i2v.settings import keywords as keywords_module
from modelscope_i2v.settings.keywords import check_keywords, keywords_of, split_keywords

ONE, TWO = "image-to-video", "video-to-video"
OF_PIPELINES = {
    ONE: ["output_video", "batch_size", "refine", "keep_first"], TWO: ["output_video", "batch_size"]
}  # fmt: skip


@pytest.fixture
def warnings(caplog):
    """The messages of warnings, each shown as if it were the first time."""
    keywords_module._warn_of_ignored.cache_clear()
    caplog.set_level(logging.WARNING, logger="modelscope_i2v.settings.keywords")
    return lambda: [record.getMessage() for record in caplog.records]


def test_keywords_of_each_stage():
    one, two = set(keywords_of(ONE)), set(keywords_of(TWO))
    assert one | two < WRONG.keys()
    assert one - two == {"noise_strength", "solver"}
    assert two - one == {
        "guide_rescale", "total_noise_levels", "solver_mode", "positive_prompt", "negative_prompt", "text",
        "scale", "scene_cuts", "tile_size", "tile_overlap", "colour", "keep_audio", "codec", "crf", "pix_fmt",
    }  # fmt: skip


@pytest.mark.parametrize(
    "stage, name, hint",
    [
        (ONE, "step", "; did you mean 'steps'?"),
        (ONE, "guidance_scale", "; did you mean 'guide_scale'?"),
        (TWO, "negative_promt", "; did you mean 'negative_prompt'?"),
        (ONE, "refin", "; did you mean 'refine'?"),
        (ONE, "solver_mode", ": video-to-video has it"),
        (TWO, "noise_strength", ": image-to-video has it"),
        (ONE, "precision", ": it is a keyword of pipeline() and a key of configuration.json"),
        (ONE, "refine_steps", ": it is stage two's, in calls of stage one with refine=True"),
        (ONE, "refine_stps", ": it is stage two's, in calls of stage one with refine=True"),
    ],
)
def test_keyword_that_resembles_a_known_one_is_refused_with_those(stage, name, hint):
    with pytest.raises(InvalidInputError) as refusal:
        check_keywords(stage, {"seed": 1, name: None})
    message = str(refusal.value)
    assert message.startswith(f"{stage} has no keyword {name!r}{hint}")
    known = message[message.lower().rindex("known are ") + len("known are ") :].split(", ")
    assert known == sorted([*OF_PIPELINES[stage], *keywords_of(stage)])


#: By keyword a value that is not allowed, and what is: a setting's own, and what only calls have.
WRONG = {
    **{name: (bad[0], allowed) for name, (_, bad, allowed) in TABLE.items()},
    "fps": (1000, "a whole number from 1 to 240 or source"),
    "text": (3, "a text"),
    "chunk_size": (0, "a whole number from 1 to 100000"),
    "overlap_size": (-1, "a whole number from 0 to 100000"),
    "generator": (5, "a torch.Generator"),
    "callback": ("print", "a function"),
    "progress": (1, "true or false"),
    "lora": (3, "a path, or a list of paths"),
    "lora_dir": (["a", ""], "a path, or a list of paths"),
    "lora_scale": ([1, 20], "a number from -10 to 10, or a list of such"),
}


@pytest.mark.parametrize("name", sorted({*keywords_of(ONE), *keywords_of(TWO)}))
def test_wrong_value_is_named_with_what_is_allowed(name):
    value, allowed = WRONG[name]
    value = 3 if value is None else value  # which a call does not give
    allowed = allowed if allowed.endswith(", or none") else f"{allowed}, or none"
    with pytest.raises(InvalidInputError) as refusal:
        check_keywords(TWO if name in keywords_of(TWO) else ONE, {name: value})
    assert str(refusal.value) == f"{name}: got {value!r}, allowed is {allowed}"


# Unknown ones


@pytest.mark.parametrize("stage", [ONE, TWO])
def test_keyword_that_resembles_none_is_ignored_with_one_warning(stage, warnings):
    for _ in range(2):
        checked = check_keywords(stage, {"duration": 10, "seed": 1, "fp16": None, "variant": "fp16"})
        assert checked == {"seed": 1}
    assert warnings() == [
        f"{stage}: the keyword {name!r} is unknown, and ignored" for name in ("duration", "fp16", "variant")
    ]


def test_unknown_keywords_of_a_call_of_both_stages(warnings):
    assert split_keywords({"duration": 10, "refine_duration": 2, "fp16": 1}) == ({}, {})
    assert warnings() == [
        f"{ONE} and {TWO}: the keyword {name!r} is unknown, and ignored"
        for name in ("duration", "fp16", "refine_duration")
    ]
    for slip, stage, near in (
        ("sead", ONE, "seed"),
        ("solvr", ONE, "solver"),
        ("keep_frist", ONE, "keep_first"),
        ("txt", TWO, "text"),
        ("negative_promt", TWO, "negative_prompt"),
        ("refine_step", TWO, "refine_steps"),
        ("refine_gide_scale", TWO, "refine_guide_scale"),
    ):
        with pytest.raises(InvalidInputError) as refusal:
            split_keywords({"seed": 1, slip: 1})
        words = f"{stage} has no keyword {slip!r}; did you mean {near!r}? Known are "
        assert str(refusal.value).startswith(words)
    with pytest.raises(InvalidInputError, match="no keyword 'precision': it is a keyword of pipeline"):
        split_keywords({"precision": "fp16"})


# Both stages


def test_keywords_of_a_call_of_both_stages_go_to_the_stage_that_they_are_for():
    generator = torch.Generator()
    both = {"seed": 3, "fps": 9, "callback": print, "progress": True, "generator": generator}
    for_both = {**both, "target_fps": both.pop("fps")}
    for_both.pop("fps")
    first = {"steps": 5, "guide_scale": 2.0, "noise_strength": 0.5, "solver": "dpmpp"}
    second = {"text": "a cat", "solver_mode": "normal", "guide_rescale": 0.5}
    prefixed = {"refine_steps": 7, "refine_resolution": [64, 32], "refine_text": "a dog"}
    given = {**both, "fps": 9, **first, **second, **prefixed}
    expected = {**for_both, **second, "steps": 7, "resolution": (64, 32), "text": "a dog"}
    for keywords in (given, dict(reversed(given.items()))):
        assert split_keywords(keywords) == ({**for_both, **first}, expected)
    # Of stage two's own kind, before what is for both; None is not given.
    assert split_keywords({"refine_fps": 24, "refine_seed": 4, "seed": 3, "target_fps": 9, "text": None}) == (
        {"seed": 3, "target_fps": 9},
        {"seed": 4, "target_fps": 24},
    )
    with pytest.raises(InvalidInputError, match="^refine_steps: got 0, allowed is a whole number"):
        split_keywords({"refine_steps": 0})


@pytest.mark.parametrize("stage", [ONE, TWO])
def test_values_have_their_proper_types_and_checking_twice_changes_nothing(stage):
    given = {"fps": np.uint8(9), "seed": np.int64(3), "guide_scale": np.float32(2.5), "resolution": [64, 32]}
    once = check_keywords(stage, given)
    assert once == {"target_fps": 9, "seed": 3, "guide_scale": 2.5, "resolution": (64, 32)}
    assert [type(once[name]) for name in ("target_fps", "seed", "guide_scale")] == [int, int, float]
    assert check_keywords(stage, once) == once
