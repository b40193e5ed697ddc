"""The autoencoder: the published computation, its parameters' names, and its posterior."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import load_fixture, load_json, relative_error
from tiny_networks import normal, with_random_weights

from modelscope_i2v.errors import ConfigurationError, InvalidInputError
from modelscope_i2v.models.autoencoder import (
    SCALE_FACTOR,
    AttentionBlock,
    Autoencoder,
    AutoencoderConfig,
    DiagonalGaussian,
    Downsample,
    ResidualBlock,
    Upsample,
)

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module")
def published() -> Autoencoder:
    """The fixtures' autoencoder: small, but with the published four levels."""
    meta = load_json("meta")["autoencoder"]
    names = ("in_channels", "out_ch", "ch", "num_res_blocks", "z_channels")
    config = AutoencoderConfig(**{name: meta[name] for name in names}, ch_mult=tuple(meta["ch_mult"]))
    return with_random_weights(Autoencoder(config))


@pytest.fixture
def tiny() -> Autoencoder:
    return with_random_weights(Autoencoder(AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)))


def test_decoding_is_the_published_one(published):
    fixture = load_fixture("autoencoder")
    assert relative_error(published.decode(torch.from_numpy(fixture["z"])), fixture["decoded"]) < 1e-5


def test_encoding_is_the_published_one(published):
    fixture = load_fixture("autoencoder")
    posterior = published.encode(torch.from_numpy(fixture["x"]))
    assert relative_error(posterior.mean, fixture["mean"]) < 1e-5
    assert relative_error(posterior.logvar, fixture["logvar"]) < 1e-5


def test_full_size_parameters_are_the_published_ones():
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig())
    ours = {name: list(value.shape) for name, value in autoencoder.state_dict().items()}
    assert ours == load_json("state_dicts")["autoencoder"]
    assert sum(value.numel() for value in autoencoder.parameters()) // 1_000_000 == 83
    assert not list(autoencoder.buffers())


def test_scale_factor():
    assert SCALE_FACTOR == 0.18215


# The posterior


def test_sample_is_the_mean_and_the_deviations_share_of_the_noise():
    posterior = DiagonalGaussian(normal(2, 4, 3, 5), normal(2, 4, 3, 5, seed=1))
    noise = normal(2, 4, 3, 5, seed=2)
    expected = posterior.mean + posterior.logvar.exp().sqrt() * noise
    assert relative_error(posterior.sample(noise), expected) < 1e-6
    assert torch.equal(posterior.mode(), posterior.mean)
    assert torch.equal(posterior.sample(torch.zeros_like(noise)), posterior.mode())


def test_sample_draws_from_the_generator_given():
    posterior = DiagonalGaussian(torch.zeros(1, 4, 64, 64), torch.full((1, 4, 64, 64), 2.0).log())
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    first, second = posterior.sample(generator=generator), posterior.sample(generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, posterior.sample(generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(first, second)
    assert first.var().item() == pytest.approx(2, rel=0.05)
    assert not torch.equal(posterior.sample(), posterior.sample())


def test_sample_has_the_means_dtype():
    posterior = DiagonalGaussian(torch.zeros(1, 4, 2, 2).bfloat16(), torch.zeros(1, 4, 2, 2).bfloat16())
    assert posterior.sample(normal(1, 4, 2, 2)).dtype == torch.bfloat16
    assert posterior.sample(generator=torch.Generator()).dtype == torch.bfloat16


@pytest.mark.parametrize("bias, logvar", [(1000.0, 20.0), (-1000.0, -30.0)])
def test_log_variance_is_clamped(tiny, bias, logvar):
    tiny.quant_conv.bias.fill_(bias)
    posterior = tiny.encode(normal(1, 3, 8, 8))
    assert (posterior.logvar == logvar).all()
    assert (posterior.mean.sign() == torch.tensor(bias).sign()).all()
    assert posterior.mean.abs().min() > 30  # the mean is not


# Shapes


def test_frames_are_independent(published):
    frames, latents = normal(3, 3, 16, 24), normal(3, 4, 2, 3)
    together, decoded = published.encode(frames), published.decode(latents)
    for index in range(3):
        alone = published.encode(frames[index : index + 1])
        assert relative_error(together.mean[index], alone.mean[0]) < 1e-5
        assert relative_error(together.logvar[index], alone.logvar[0]) < 1e-5
        assert relative_error(decoded[index], published.decode(latents[index : index + 1])[0]) < 1e-5


@pytest.mark.parametrize("ch_mult", [(1,), (1, 2), (1, 1, 2), (1, 1, 1, 1)])
def test_latents_are_smaller_by_the_downscale(ch_mult):
    config = AutoencoderConfig(ch=32, ch_mult=ch_mult, num_res_blocks=1)
    assert config.downscale == 2 ** (len(ch_mult) - 1)
    autoencoder = with_random_weights(Autoencoder(config))
    x = normal(1, 3, 3 * config.downscale, 2 * config.downscale)
    latent = autoencoder.encode(x).mode()
    assert latent.shape == (1, 4, 3, 2)
    assert autoencoder.decode(latent).shape == x.shape


def test_published_downscale():
    assert AutoencoderConfig().downscale == 8


def test_computes_in_the_parameters_dtype(tiny):
    x = normal(1, 3, 8, 8)
    expected = tiny.encode(x).mean
    half = tiny.bfloat16()
    posterior = half.encode(x)
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.bfloat16
    assert relative_error(posterior.mean.float(), expected) < 0.05
    assert half.decode(normal(1, 4, 2, 2)).dtype == torch.bfloat16


# Pieces


def test_downsample_pads_below_and_to_the_right():
    layer, x = with_random_weights(Downsample(3)), normal(1, 3, 6, 8)
    padded = torch.zeros(1, 3, 7, 9)
    padded[..., :6, :8] = x
    expected = F.conv2d(padded, layer.conv.weight, layer.conv.bias, stride=2)
    assert torch.equal(layer(x), expected)


def test_upsample_repeats_pixels():
    layer, x = with_random_weights(Upsample(3)), normal(1, 3, 3, 4)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(layer(x), F.conv2d(repeated, layer.conv.weight, layer.conv.bias, padding=1))


def test_attention_is_over_positions_with_one_head():
    layer, x = with_random_weights(AttentionBlock(32)), normal(2, 32, 3, 4)
    h = F.group_norm(x, 32, layer.norm.weight, layer.norm.bias, eps=1e-6)
    q, k, v = (project(h).flatten(2).transpose(1, 2) for project in (layer.q, layer.k, layer.v))
    weights = (q @ k.transpose(1, 2) / 32**0.5).softmax(-1)
    expected = x + layer.proj_out((weights @ v).transpose(1, 2).reshape_as(x))
    assert relative_error(layer(x), expected) < 1e-6


def test_residual_block_formula():
    layer, x = with_random_weights(ResidualBlock(32, 64)), normal(2, 32, 3, 4)
    h = layer.conv1(F.silu(F.group_norm(x, 32, layer.norm1.weight, layer.norm1.bias, eps=1e-6)))
    h = layer.conv2(F.silu(F.group_norm(h, 32, layer.norm2.weight, layer.norm2.bias, eps=1e-6)))
    assert relative_error(layer(x), layer.nin_shortcut(x) + h) < 1e-6
    assert all(norm.eps == 1e-6 for norm in layer.modules() if isinstance(norm, torch.nn.GroupNorm))


# Refusals


@pytest.mark.parametrize(
    "shape", [(1, 3, 12, 16), (1, 3, 16, 20), (3, 16, 16), (1, 3, 2, 16, 16), (1, 4, 16, 16)]
)
def test_images_that_do_not_fit_are_refused(published, shape):
    with pytest.raises(InvalidInputError) as refusal:
        published.encode(torch.zeros(shape))
    assert str(refusal.value) == (
        f"autoencoder: images must be [N, 3, H, W] with H and W multiples of 8, got {list(shape)}"
    )


def test_widths_that_cannot_be_normalised_are_refused():
    with pytest.raises(ConfigurationError) as refusal:
        AutoencoderConfig(ch=48)
    assert str(refusal.value) == "auto_encoder: ch must be a multiple of num_groups 32, got 48"
