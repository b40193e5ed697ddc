"""Approximate modes: what each leaves out, that it is labelled, and that a label reproduces it."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative_error
from modelscope.outputs import OutputKeys
from modelscope.pipelines import pipeline

from modelscope_i2v.media.video import read_video
from modelscope_i2v.models.unet import UNet
from modelscope_i2v.samplers.ddim import sample_ddim
from modelscope_i2v.samplers.dpmpp import sample_dpmpp_2m
from modelscope_i2v.samplers.schedules import ddim_levels, karras_levels, stable_diffusion_schedule
from modelscope_i2v.settings.record import keywords_like

# The sampler


SCHEDULE = stable_diffusion_schedule()
LEVELS = {sample_ddim: ddim_levels, sample_dpmpp_2m: karras_levels}
DEVIATION = 0.5


def normal_data(x, level):
    """The denoiser of data that are normal around 0: x0 given x is a multiple of x."""
    return x * level.alpha * DEVIATION**2 / (level.alpha**2 * DEVIATION**2 + level.sigma**2)


def error_for_normal_data(sample, steps: int) -> float:
    """Against the exact solution of the probability-flow equation, which scales the state."""
    x = torch.randn(1, 4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = LEVELS[sample](SCHEDULE, steps)

    def spread(level):
        return math.sqrt(level.alpha**2 * DEVIATION**2 + level.sigma**2)

    expected = x * spread(levels[-1]) / spread(levels[0])
    return relative_error(sample(normal_data, x, levels), expected)


def test_dpmpp_converges_at_second_order_and_ddim_at_first():
    for sample, order in ((sample_ddim, 1), (sample_dpmpp_2m, 2)):
        errors = [error_for_normal_data(sample, steps) for steps in (10, 20, 40)]
        for coarse, fine in zip(errors, errors[1:]):
            assert math.log2(coarse / fine) > 0.75 * order, (sample.__name__, errors)


def test_dpmpp_needs_fewer_than_half_the_steps():
    assert error_for_normal_data(sample_dpmpp_2m, 20) < 0.5 * error_for_normal_data(sample_ddim, 50)


@pytest.mark.parametrize("steps", [1, 2, 7, 25, 50, 1000])
def test_karras_levels_descend_from_the_most_noise_to_the_least(steps):
    levels = karras_levels(SCHEDULE, steps)
    timesteps = [level.t for level in levels[:-1]]
    assert levels[-1].t == 0
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert timesteps[0] == 999 and (steps == 1 or timesteps[-1] == 1)
    assert len(timesteps) == steps if steps <= 25 else 25 < len(timesteps) <= steps


def test_karras_levels_are_even_in_the_seventh_root():
    roots = [level.s ** (1 / 7) for level in karras_levels(SCHEDULE, 10)[:-1]]
    gaps = [a - b for a, b in zip(roots, roots[1:])]
    assert max(gaps) / min(gaps) < 1.1  # timesteps are whole


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_dpmpp_is_exact_for_data_at_a_point(steps):
    point = torch.full((1, 4, 2, 3, 3), 0.7)
    noise = torch.randn(point.shape, generator=torch.Generator().manual_seed(0))
    levels, calls = karras_levels(SCHEDULE, steps), []
    x = levels[0].alpha * point + levels[0].sigma * noise
    x = sample_dpmpp_2m(lambda x, level: point, x, levels, lambda *call: calls.append(call))
    assert relative_error(x, levels[-1].alpha * point + levels[-1].sigma * noise) < 1e-5
    assert [(step, t) for step, t, _ in calls] == [(level.number, level.t) for level in levels[:-1]]


# What is left out


def calls_of(unet: UNet, run) -> list[int]:
    """How many branches each call of the UNet computes."""
    counts = []
    hook = unet.register_forward_hook(lambda _, __, output: counts.append(len(output)))
    try:
        run()
    finally:
        hook.remove()
    return counts


def test_guidance_interval_leaves_out_the_unconditional_branch(i2v, picture):
    run = lambda **keywords: i2v.generate(str(picture), steps=4, **keywords)  # noqa: E731
    assert calls_of(i2v.model.generator, run) == [2, 2, 2, 2]
    inside = calls_of(i2v.model.generator, lambda: run(guidance_interval=[300, 600]))
    assert inside == [1, 2, 1, 1]  # of timesteps 751, 501, 251, 1
    assert calls_of(i2v.model.generator, lambda: run(guide_scale=1.0)) == [1, 1, 1, 1]


def deep_calls(unet: UNet, run) -> int:
    calls = []
    hook = unet.middle_block[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        run()
    finally:
        hook.remove()
    return len(calls)


@pytest.mark.parametrize("interval, expected", [(1, 6), (2, 3), (3, 2), (100, 1)])
def test_deep_features_are_computed_at_every_nth_step(i2v, picture, interval, expected):
    def run():
        i2v.generate(str(picture), steps=6, reuse_interval=interval)

    assert deep_calls(i2v.model.generator, run) == expected


def test_each_window_of_a_long_video_has_features_of_its_own(v2v, clip):
    frames = read_video(clip).frames
    seen = []
    unet = v2v.model.generator
    hook = unet.middle_block[0].register_forward_hook(lambda *_: seen.append(1))
    try:
        v2v({"video_path": str(clip)}, chunk_size=3, overlap_size=2, steps=4, reuse_interval=2)
    finally:
        hook.remove()
    assert len(frames) == 4  # two windows, two branches in one pass, two of four steps
    assert len(seen) == 2 * 2


def test_nothing_is_approximated_by_settings_that_leave_nothing_out(i2v, picture):
    exact = i2v.generate(str(picture)).frames
    assert (i2v.generate(str(picture), guidance_interval=[0, 999]).frames == exact).all()
    assert (i2v.generate(str(picture), reuse_interval=1).frames == exact).all()


# Labels

MODES = [
    ("i2v", {"solver": "dpmpp", "steps": 3}, "approximate: solver dpmpp"),
    ("i2v", {"guidance_interval": [0, 400], "steps": 3}, "approximate: guidance_interval 0-400"),
    ("v2v", {"reuse_interval": 2, "steps": 3}, "approximate: reuse_interval 2"),
]


@pytest.mark.parametrize("stage, keywords, mode", MODES)
def test_log_result_and_file_say_what_was_approximated(
    stage, keywords, mode, picture, clip, tmp_path, request, caplog
):
    pipe = request.getfixturevalue(stage)
    source = str(picture) if stage == "i2v" else {"video_path": str(clip)}
    path = tmp_path / "video.mp4"
    with caplog.at_level("INFO"):
        result = pipe(source, output_video=str(path), **keywords)
    assert result["mode"] == mode
    assert read_video(str(path)).metadata["mode"] == mode
    assert mode in caplog.text
    caplog.clear()
    exact = pipe(source, steps=3)
    assert exact["mode"] == "exact" and "approximate" not in caplog.text
    assert exact[OutputKeys.OUTPUT_VIDEO] != path.read_bytes()


def test_a_file_s_label_makes_another_like_it(i2v, picture, tmp_path):
    path = tmp_path / "video.mp4"
    keywords = {"solver": "dpmpp", "steps": 3, "guidance_interval": [100, 800], "reuse_interval": 2}
    i2v(str(picture), output_video=str(path), **keywords)
    like, _ = keywords_like(read_video(str(path)).metadata, "video.mp4")
    assert {name: like[name] for name in keywords} == {**keywords, "guidance_interval": (100, 800)}
    again = i2v(str(picture), **like)
    assert again[OutputKeys.OUTPUT_VIDEO] == path.read_bytes()


def test_settings_of_the_pipeline_approximate_too(small_model, picture):
    pipe = pipeline("image-to-video", model=str(small_model[0]), device="cpu", solver="dpmpp")
    assert pipe(str(picture))["mode"] == "approximate: solver dpmpp"
