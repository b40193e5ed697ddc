"""The UNet as a guided velocity: the formula, however its branches are computed."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from tiny_networks import STAGES, TINY, built, inputs_of, normal

from modelscope_i2v.engine import denoising
from modelscope_i2v.engine.denoising import ChunkLimit
from modelscope_i2v.models.unet import UNet, UNetConfig
from modelscope_i2v.settings.keywords import check_keywords
from modelscope_i2v.settings.request import Request
from modelscope_i2v.settings.stages import ImageToVideoSettings

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(params=STAGES, scope="module")
def unet(request) -> UNet:
    return built(UNetConfig(**TINY, **STAGES[request.param]))


def requested(**keywords) -> Request:
    settings = ImageToVideoSettings()
    return Request.resolve(settings, check_keywords(settings.stage, keywords))


def guided_velocity(*arguments, **conditions):
    return denoising.guided_velocity(*arguments, ChunkLimit(2**22), **conditions)


def case(unet: UNet, batch: int = 1, frames: int = 3):
    """A state, both branches' conditioning, and what else the UNet is told."""
    inputs = inputs_of(unet, batch, frames, 16, 16)
    x, y = inputs["x"], inputs["y"]
    told = {"fps": inputs["fps"]} if "fps" in inputs else {}
    return x, y, normal(*y.shape, seed=9), told


@pytest.mark.parametrize("together", [0, 10**9])
@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_guidance_of_the_two_predictions(unet, batch, together, monkeypatch):
    monkeypatch.setitem(denoising._TOGETHER, "cpu", together)
    x, y, negative_y, told = case(unet, batch)
    t = torch.full((batch,), 640)
    v_c, v_u = unet(x, t, y, **told), unet(x, t, negative_y, **told)
    velocity = guided_velocity(unet, y, negative_y, requested(guide_scale=3.0), **told)
    assert relative_error(velocity(x, 640), v_u + 3.0 * (v_c - v_u)) < 1e-5


def test_at_scale_one_the_unconditional_has_no_part(unet):
    x, y, negative_y, told = case(unet)
    velocity = guided_velocity(unet, y, negative_y, requested(guide_scale=1.0), **told)
    assert torch.equal(velocity(x, 640), unet(x, torch.tensor([640]), y, **told))
    other = guided_velocity(unet, y, negative_y + 1, requested(guide_scale=1.0), **told)
    assert torch.equal(velocity(x, 640), other(x, 640))


def test_prompts_of_different_lengths_go_one_after_the_other():
    unet = built(UNetConfig(**TINY, **STAGES["unet_v2v"]))
    x, y, _, _ = case(unet)
    negative_y = normal(1, 5, y.shape[2], seed=9)
    t = torch.tensor([640])
    v_c, v_u = unet(x, t, y), unet(x, t, negative_y)
    velocity = guided_velocity(unet, y, negative_y, requested(guide_scale=7.5))
    assert relative_error(velocity(x, 640), v_u + 7.5 * (v_c - v_u)) < 1e-5


def test_half_precision_gives_a_state_in_float32(unet):
    x, y, negative_y, told = case(unet)
    half = built(unet.config).to(torch.bfloat16)
    v = guided_velocity(half, y, negative_y, requested(), **told)(x, 640)
    assert v.dtype == torch.float32
    assert relative_error(v, guided_velocity(unet, y, negative_y, requested(), **told)(x, 640)) < 0.2


def test_features_of_both_kinds_of_calls_are_kept_apart(unet):
    """With an interval of guidance there are calls of one branch and of two; each uses its own kind's."""
    x, y, negative_y, told = case(unet)
    request = requested(reuse_interval=3, guidance_interval=[0, 700], guide_scale=3.0)
    velocity = guided_velocity(unet, y, negative_y, request, **told)
    for t in (900, 800, 600, 500):
        assert velocity(x, t).shape == x.shape
    fresh, plain = (
        guided_velocity(unet, y, negative_y, each, **told) for each in (request, requested(guide_scale=3.0))
    )
    assert torch.equal(fresh(x, 600), plain(x, 600))
