"""The UNet as a guided denoiser: the formula, however its branches are computed."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from tiny_networks import STAGES, TINY, built, inputs_of, normal

from modelscope_i2v.engine import denoising
from modelscope_i2v.engine.denoising import ChunkLimit
from modelscope_i2v.errors import NumericalError
from modelscope_i2v.models.unet import UNet, UNetConfig
from modelscope_i2v.samplers.ddim import sample_ddim
from modelscope_i2v.samplers.heun import sample_heun
from modelscope_i2v.samplers.schedules import (
    ddim_levels,
    heun_levels,
    sdedit_schedule,
    stable_diffusion_schedule,
)
from modelscope_i2v.settings.keywords import check_keywords
from modelscope_i2v.settings.request import Request
from modelscope_i2v.settings.stages import ImageToVideoSettings

pytestmark = pytest.mark.usefixtures("without_gradients")

LEVEL = stable_diffusion_schedule().level(640)


@pytest.fixture(params=STAGES, scope="module")
def unet(request) -> UNet:
    return built(UNetConfig(**TINY, **STAGES[request.param]))


def requested(**keywords) -> Request:
    settings = ImageToVideoSettings()
    return Request.resolve(settings, check_keywords(settings.stage, keywords))


def guided_denoiser(*arguments, **conditions):
    return denoising.guided_denoiser(*arguments, ChunkLimit(2**22), **conditions)


def case(unet: UNet, batch: int = 1, frames: int = 3):
    """A state, both branches' conditioning, and what else the UNet takes."""
    inputs = inputs_of(unet, batch, frames, 16, 16)
    x, y = inputs["x"], inputs["y"]
    conditions = {"fps": inputs["fps"]} if "fps" in inputs else {}
    return x, y, normal(*y.shape, seed=9), conditions


def x0_of(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return LEVEL.alpha * x - LEVEL.sigma * v


@pytest.mark.parametrize("together", [0, 10**9])
@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_guidance_of_the_two_predictions(unet, batch, together, monkeypatch):
    monkeypatch.setitem(denoising._TOGETHER, "cpu", together)
    x, y, negative_y, conditions = case(unet, batch)
    t = torch.full((batch,), 640)
    v_c, v_u = unet(x, t, y, **conditions), unet(x, t, negative_y, **conditions)
    denoise = guided_denoiser(unet, y, negative_y, requested(guide_scale=3.0), **conditions)
    assert relative_error(denoise(x, LEVEL), x0_of(x, v_u + 3.0 * (v_c - v_u))) < 1e-5


def test_at_scale_one_the_unconditional_has_no_part(unet):
    x, y, negative_y, conditions = case(unet)
    denoise = guided_denoiser(unet, y, negative_y, requested(guide_scale=1.0), **conditions)
    assert torch.equal(denoise(x, LEVEL), x0_of(x, unet(x, torch.tensor([640]), y, **conditions)))
    other = guided_denoiser(unet, y, negative_y + 1, requested(guide_scale=1.0), **conditions)
    assert torch.equal(denoise(x, LEVEL), other(x, LEVEL))


def test_prompts_of_different_lengths_go_one_after_the_other():
    unet = built(UNetConfig(**TINY, **STAGES["unet_v2v"]))
    x, y, _, _ = case(unet)
    negative_y = normal(1, 5, y.shape[2], seed=9)
    t = torch.tensor([640])
    v_c, v_u = unet(x, t, y), unet(x, t, negative_y)
    denoise = guided_denoiser(unet, y, negative_y, requested(guide_scale=7.5))
    assert relative_error(denoise(x, LEVEL), x0_of(x, v_u + 7.5 * (v_c - v_u))) < 1e-5


def test_half_precision_gives_a_state_in_float32(unet):
    x, y, negative_y, conditions = case(unet)
    half = built(unet.config).to(torch.bfloat16)
    x0 = guided_denoiser(half, y, negative_y, requested(), **conditions)(x, LEVEL)
    assert x0.dtype == torch.float32
    assert relative_error(x0, guided_denoiser(unet, y, negative_y, requested(), **conditions)(x, LEVEL)) < 0.2


@pytest.mark.parametrize("dtype, words", [(torch.float32, "in fp32$"), (torch.bfloat16, "in bf16; try prec")])
def test_latents_that_are_not_finite_end_the_call(dtype, words):
    unet = built(UNetConfig(**TINY)).to(dtype)
    x, y, negative_y, conditions = case(unet)
    unet.middle_block[0].in_layers[2].weight[0] = float("nan")
    denoise = guided_denoiser(unet, y, negative_y, requested(), **conditions)
    with pytest.raises(NumericalError, match=f"step 1: the latents are not finite, computed {words}"):
        sample_ddim(denoise, x, ddim_levels(stable_diffusion_schedule(), 2))


# Reuse of deep features


def deep_levels(unet: UNet, levels, sample, request: Request) -> list[int]:
    """The numbers of the levels at which deep features are computed."""
    x, y, negative_y, conditions = case(unet, frames=4)
    denoise, numbers, current = guided_denoiser(unet, y, negative_y, request, **conditions), [], []

    def watched(x, level):
        current[:] = [level.number]
        return denoise(x, level)

    hook = unet.middle_block[0].register_forward_hook(lambda *_: numbers.extend(current))
    try:
        sample(watched, x, levels)
    finally:
        hook.remove()
    return numbers


@pytest.mark.parametrize("noise_levels", [600, 3])
def test_heun_uses_features_of_the_levels_whose_turn_it_is(noise_levels):
    """It calls a level twice, and with few noise levels several levels have one timestep."""
    unet = built(UNetConfig(**TINY, **STAGES["unet_v2v"]))
    levels = heun_levels(sdedit_schedule(), 6, noise_levels)
    assert noise_levels > 3 or len({level.t for level in levels[:-1]}) < 6
    numbers = deep_levels(unet, levels, sample_heun, requested(reuse_interval=2, guide_scale=1.0))
    computed = [number for number in (0, 2, 4) if number < len(levels) - 1]
    assert numbers == [number for number in computed for _ in range(2 if number else 1)]


def test_each_window_has_features_of_its_own():
    unet, levels = built(UNetConfig(**TINY)), ddim_levels(stable_diffusion_schedule(), 4)
    request = requested(reuse_interval=2, guide_scale=1.0, chunk_size=3, overlap_size=2)
    assert deep_levels(unet, levels, sample_ddim, request) == [0, 0, 2, 2]


def test_features_of_both_kinds_of_calls_are_kept_apart(unet):
    """With an interval of guidance there are calls of one branch and of two; each uses its own kind's."""
    x, y, negative_y, conditions = case(unet)
    request = requested(reuse_interval=3, guidance_interval=[0, 700], guide_scale=3.0)
    denoise = guided_denoiser(unet, y, negative_y, request, **conditions)
    schedule = stable_diffusion_schedule()
    for number, t in enumerate((900, 800, 600, 500)):
        assert denoise(x, schedule.level(t, number=number)).shape == x.shape
    plain = guided_denoiser(unet, y, negative_y, requested(guide_scale=3.0), **conditions)
    fresh = guided_denoiser(unet, y, negative_y, request, **conditions)
    assert torch.equal(fresh(x, schedule.level(600, number=2)), plain(x, schedule.level(600)))
