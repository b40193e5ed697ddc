"""Between videos and latents: sizes that do not fit, chunks, and random draws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from make_small_model import random_state_dict
from tiny_networks import normal

from modelscope_i2v.engine.latents import (
    decode_latents,
    draw_noise,
    encode_frames,
    latent_size,
    sample_latents,
)
from modelscope_i2v.models.autoencoder import Autoencoder, AutoencoderConfig
from modelscope_i2v.models.unet import UNetConfig

pytestmark = pytest.mark.usefixtures("without_gradients")

STAGE_ONE = UNetConfig()
STAGE_TWO = UNetConfig(image_conditioned=False, row_padding=2)
SCALE = 0.18215


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    """With a downscale of 4."""
    model = Autoencoder(AutoencoderConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1))
    model.load_state_dict(random_state_dict(model))
    return model.eval()


# Sizes


def test_published_videos_fill_their_latents():
    assert latent_size((448, 256), STAGE_ONE, 8) == (32, 56)
    assert latent_size((1280, 720), STAGE_TWO, 8) == (90, 160)


@pytest.mark.parametrize("unet", [STAGE_ONE, STAGE_TWO], ids=["one", "two"])
@pytest.mark.parametrize("size", [(8, 8), (449, 257), (1920, 1080), (854, 480), (99, 1001), (1, 1)])
def test_latents_cover_the_video_and_no_more_than_needed(unet, size):
    height, width = latent_size(size, unet, 8)
    assert unet.padded_size(height, width) == (height, width)
    assert 8 * width >= size[0]
    assert 8 * height >= size[1]
    assert 8 * width < size[0] + 64  # the UNet takes every eighth size
    assert 8 * height < size[1] + 64 or (unet is STAGE_TWO and height == 2)


# Encoding


def encoded(autoencoder, frames, size, latent, noise=None):
    noise = torch.zeros(len(frames), 4, *latent) if noise is None else noise
    return sample_latents(encode_frames(autoencoder, frames, size, latent), noise)


def test_encoding_is_the_scaled_posterior_of_each_frame(autoencoder):
    frames, noise = normal(3, 3, 16, 24), normal(3, 4, 4, 6, seed=1)
    posterior = autoencoder.encode(frames)
    expected = SCALE * (posterior.mean + (posterior.logvar / 2).exp() * noise)
    latents = encoded(autoencoder, frames, (24, 16), (4, 6), noise)
    assert latents.shape == (1, 4, 3, 4, 6)
    assert latents.dtype == torch.float32
    assert relative_error(latents[0].transpose(0, 1), expected) < 1e-5


def test_each_frame_has_its_own_posterior_noise(autoencoder):
    frames, noise = normal(1, 3, 16, 24).expand(3, -1, -1, -1), normal(3, 4, 4, 6, seed=1)
    without = encoded(autoencoder, frames, (24, 16), (4, 6))
    difference = encoded(autoencoder, frames, (24, 16), (4, 6), noise) - without
    std = (autoencoder.encode(frames[:1]).logvar / 2).exp()
    assert relative_error(difference[0].transpose(0, 1), SCALE * std * noise) < 1e-3
    assert relative_error(without[:, :, 0], without[:, :, 2]) == 0


@pytest.mark.parametrize("size", [(24, 16), (22, 13), (17, 9), (1, 1)])
def test_smaller_videos_are_padded_by_their_edge(autoencoder, size):
    width, height = size
    frames = normal(2, 3, height, width)
    padded = torch.empty(2, 3, 16, 24)
    for row in range(16):
        for column in range(24):
            padded[..., row, column] = frames[..., min(row, height - 1), min(column, width - 1)]
    latents = encoded(autoencoder, frames, size, (4, 6))
    assert latents.shape == (1, 4, 2, 4, 6)
    assert relative_error(latents, encoded(autoencoder, padded, (24, 16), (4, 6))) < 1e-6


@pytest.mark.parametrize("given", [(9, 11), (32, 48), (16, 24)])
def test_frames_are_resized_bilinearly(autoencoder, given):
    frames = normal(2, 3, *given)
    resized = F.interpolate(frames, size=(16, 24), mode="bilinear", align_corners=False)
    ours = encoded(autoencoder, frames, (24, 16), (4, 6))
    assert relative_error(ours, encoded(autoencoder, resized, (24, 16), (4, 6))) < 1e-6


def test_enlarging_interpolates_between_pixel_centres(autoencoder):
    """Twice the size puts three quarters of the nearer pixel and a quarter of the next into each new one."""
    frames = normal(1, 3, 8, 12)
    rows = torch.cat([frames[:, :, :1], frames, frames[:, :, -1:]], dim=2)
    near = 0.75 * frames
    upper, lower = near + 0.25 * rows[:, :, :-2], near + 0.25 * rows[:, :, 2:]
    rows = torch.stack([upper, lower], dim=3).flatten(2, 3)
    columns = torch.cat([rows[..., :1], rows, rows[..., -1:]], dim=3)
    near = 0.75 * rows
    left, right = near + 0.25 * columns[..., :-2], near + 0.25 * columns[..., 2:]
    expected = torch.stack([left, right], dim=4).flatten(3, 4)
    ours = encoded(autoencoder, frames, (24, 16), (4, 6))
    assert relative_error(ours, encoded(autoencoder, expected, (24, 16), (4, 6))) < 1e-5


# Decoding


@pytest.mark.parametrize("size", [(24, 16), (22, 13), (17, 9)])
def test_decoding_crops_to_the_size(autoencoder, size):
    latents = normal(1, 4, 2, 4, 6)
    width, height = size
    video = decode_latents(autoencoder, latents, size, 8)
    assert video.shape == (1, 3, 2, height, width)
    assert video.dtype == torch.float32
    for frame in range(2):
        expected = autoencoder.decode(latents[:, :, frame] / SCALE)[..., :height, :width]
        assert relative_error(video[:, :, frame], expected) < 1e-5


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_chunks_change_nothing(autoencoder, chunk):
    latents = normal(2, 4, 5, 3, 4)
    expected = decode_latents(autoencoder, latents, (16, 12), 10)
    assert relative_error(decode_latents(autoencoder, latents, (16, 12), chunk), expected) < 1e-5


@pytest.mark.parametrize("chunk, calls", [(1, 10), (2, 5), (4, 3), (100, 1)])
def test_no_more_frames_than_a_chunk_are_decoded_at_a_time(autoencoder, monkeypatch, chunk, calls):
    sizes, decode = [], autoencoder.decode

    def recorded(z):
        sizes.append(len(z))
        return decode(z)

    monkeypatch.setattr(autoencoder, "decode", recorded)
    decode_latents(autoencoder, normal(2, 4, 5, 2, 2), (8, 8), chunk)
    assert len(sizes) == calls
    assert max(sizes) <= chunk
    assert sum(sizes) == 10


def test_videos_of_a_batch_stay_apart(autoencoder):
    latents = normal(2, 4, 3, 4, 6)
    together = decode_latents(autoencoder, latents, (24, 16), 4)
    for index in range(2):
        alone = decode_latents(autoencoder, latents[index : index + 1], (24, 16), 4)
        assert relative_error(together[index], alone[0]) < 1e-5


@pytest.mark.parametrize("size", [(24, 16), (21, 15), (5, 3)])
def test_a_video_keeps_its_size_on_the_way_through(autoencoder, size):
    latents = encoded(autoencoder, normal(2, 3, 20, 30), size, (4, 6))
    width, height = size
    assert decode_latents(autoencoder, latents, size, 2).shape == (1, 3, 2, height, width)


def test_half_precision_gives_float32_latents_and_videos():
    model = Autoencoder(AutoencoderConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1))
    model.load_state_dict(random_state_dict(model))
    model.bfloat16()
    latents = encoded(model, normal(1, 3, 16, 24), (24, 16), (4, 6))
    assert latents.dtype == torch.float32
    assert decode_latents(model, latents, (24, 16), 1).dtype == torch.float32


# Draws

SHAPE = (1, 4, 6, 5, 7)


def test_noise_is_the_generators():
    before = torch.get_rng_state()
    noise = draw_noise(torch.Generator().manual_seed(5), SHAPE)
    assert torch.equal(noise, torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(noise, draw_noise(torch.Generator().manual_seed(5), SHAPE))
    assert not torch.equal(noise, draw_noise(torch.Generator().manual_seed(6), SHAPE))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("strength", [0.1, 2.0])
def test_offset_is_one_number_a_frame_and_channel(strength):
    generator = torch.Generator().manual_seed(5)
    n, m = torch.randn(SHAPE, generator=generator), torch.randn(*SHAPE[:3], 1, 1, generator=generator)
    noise = draw_noise(torch.Generator().manual_seed(5), SHAPE, strength)
    assert relative_error(noise, n + strength * m) < 1e-6
    offset = noise - draw_noise(torch.Generator().manual_seed(5), SHAPE)
    assert offset.flatten(3).std(-1).max() < 1e-6
    assert offset[..., 0, 0].unique().numel() == 4 * 6


def test_offset_raises_the_variance():
    noise = draw_noise(torch.Generator().manual_seed(5), (1, 4, 500, 6, 6), 0.5)
    assert noise.var().item() == pytest.approx(1.25, rel=0.03)


def test_draws_advance_the_generator():
    generator = torch.Generator().manual_seed(5)
    assert not torch.equal(draw_noise(generator, SHAPE), draw_noise(generator, SHAPE))
