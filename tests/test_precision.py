"""Half precision: what ``auto`` picks, and how far from float32 it is."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative_error
from make_small_model import random_state_dict
from modelscope.pipelines import pipeline
from tiny_networks import STAGES, TINY, built, channels_last, inputs_of

from modelscope_i2v.engine import precision
from modelscope_i2v.engine.precision import cpu_has_bf16, select_dtype
from modelscope_i2v.models import autoencoder as autoencoders
from modelscope_i2v.models import unet as unets
from modelscope_i2v.models.autoencoder import Autoencoder, AutoencoderConfig
from modelscope_i2v.models.layers import GroupNormSiLU, TemporalConv
from modelscope_i2v.models.unet import UNetConfig

pytestmark = pytest.mark.usefixtures("without_gradients")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

#: ||half - float32|| / ||float32|| of one call of a network with random weights: sixteen and two times the
#: rounding of one number (2^-9 and 2^-12), which hundreds of layers add up to.
ERRORS = {torch.bfloat16: 0.03, torch.float16: 0.006}


def test_auto_is_half_precision_where_the_hardware_has_it(monkeypatch):
    assert select_dtype("auto", CUDA) == torch.float16
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "cpu_has_bf16", lambda has=has: has)
        assert select_dtype("auto", CPU) == expected
        assert select_dtype("fp32", CPU) == torch.float32
        assert select_dtype("bf16", CPU) == torch.bfloat16
    assert select_dtype("auto", torch.device("meta")) == torch.float32


@pytest.mark.parametrize(
    "capabilities, expected",
    [({"amx_bf16": True}, True), ({"avx512_bf16": True, "amx_bf16": False}, True), ({"avx512": True}, False)],
)
def test_the_processor_is_asked(capabilities, expected, monkeypatch):
    cpu_has_bf16.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_has_bf16() is expected
    cpu_has_bf16.cache_clear()


def test_an_older_torch_is_told_by_the_system(monkeypatch):
    new = cpu_has_bf16()
    cpu_has_bf16.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert cpu_has_bf16() is new
    cpu_has_bf16.cache_clear()


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_the_unet_in_half_precision(stage, dtype):
    unet = channels_last(built(UNetConfig(**TINY, **STAGES[stage])))
    inputs = inputs_of(unet, 1, 4, 16, 16)
    exact = unet(**inputs)
    half = unet.to(dtype)(**inputs)
    assert half.dtype == dtype
    assert 1e-4 < relative_error(half.float(), exact) < ERRORS[dtype]


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_the_autoencoder_in_half_precision(dtype):
    config = AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)
    autoencoder = Autoencoder(config)
    autoencoder.load_state_dict(random_state_dict(autoencoder))
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = autoencoder.decode(z)
    mean = autoencoder.encode(exact).mean
    autoencoder.to(dtype)
    assert relative_error(autoencoder.decode(z).float(), exact) < ERRORS[dtype]
    assert relative_error(autoencoder.encode(exact).mean.float(), mean) < ERRORS[dtype]


@pytest.mark.parametrize("shape", [(3, 64, 8, 8), (1, 64, 3, 64), (2, 320, 5, 7), (3, 64, 40, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_group_norm_is_the_same_in_any_layout(shape, dtype):
    """On a CPU small frames of narrow groups are normed with their channels apart."""
    norm = GroupNormSiLU(shape[1])
    norm.load_state_dict(random_state_dict(norm))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = norm(x)
    x = x.to(dtype, memory_format=torch.channels_last)
    before = x.clone()
    y = norm.to(dtype)(x)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)
    assert relative_error(y.float(), expected) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize(
    "dtype, stream",
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float32)],
    ids=str,
)
def test_the_residual_stream_of_bfloat16_is_float32(dtype, stream):
    """What blocks take and give, while their convolutions and linear maps compute in the parameters' type."""
    unet = channels_last(built(UNetConfig(**TINY))).to(dtype)
    autoencoder = Autoencoder(AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)).to(dtype)
    between, inside = set(), set()
    for network in (unet, autoencoder):
        for module in network.modules():
            if isinstance(module, (unets.ResidualBlock, autoencoders.ResidualBlock)):
                module.register_forward_hook(
                    lambda _, inputs, result: between.update((inputs[0].dtype, result.dtype))
                )
            if type(module) in (torch.nn.Conv2d, torch.nn.Linear, TemporalConv):
                module.register_forward_hook(
                    lambda _, inputs, result: inside.update((inputs[0].dtype, result.dtype))
                )
    assert unet(**inputs_of(unet, 1, 4, 16, 16)).dtype == dtype
    autoencoder.encode(autoencoder.decode(torch.zeros(1, 4, 8, 8)))
    assert (between, inside) == ({stream}, {dtype})


def psnr(frames, reference) -> float:
    """Peak signal-to-noise ratio in dB of frames from 0 to 255."""
    error = ((frames.astype(float) - reference.astype(float)) ** 2).mean()
    return 10 * math.log10(255**2 / error)


def test_stage_one_in_half_precision(small_model, picture):
    """Networks with random weights are not smooth: trained ones drive rounding errors apart less."""
    videos = {}
    for name in ("fp32", "fp16", "bf16"):
        pipe = pipeline(
            "image-to-video", model=str(small_model[0]), device="cpu", precision=name, max_frames=4
        )
        videos[name] = pipe.generate(str(picture), steps=4).frames
    assert 48 < psnr(videos["fp16"], videos["fp32"]) < 90
    assert 35 < psnr(videos["bf16"], videos["fp32"]) < 70
