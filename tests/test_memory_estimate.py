"""Limits on what a call may ask for: what is refused, in which words, and how a limit is raised."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch
from live_memory import LiveMemory, flash_attention
from tiny_networks import channels_last

from modelscope_i2v.engine.memory.estimate import chunk_of, estimate_memory, memory_in_words
from modelscope_i2v.engine.memory.limits import check_limits
from modelscope_i2v.engine.memory.tiles import TileLimit
from modelscope_i2v.errors import InvalidInputError
from modelscope_i2v.models import autoencoder
from modelscope_i2v.models.strips import decode_in_strips
from modelscope_i2v.models.unet import UNet, UNetConfig
from modelscope_i2v.settings.configuration import load_settings
from modelscope_i2v.settings.keywords import check_keywords
from modelscope_i2v.settings.request import Request
from modelscope_i2v.settings.stages import ImageToVideoSettings, VideoToVideoSettings
from modelscope_i2v.weights.loading import precision_name

pytestmark = pytest.mark.slow  # as a whole: left out of the fast loop

ONE, TWO = ImageToVideoSettings, VideoToVideoSettings
GIB = 2**30


def requested(settings, frames=None, **keywords) -> Request:
    request = Request.resolve(settings, check_keywords(settings.stage, keywords))
    check_limits(settings, request, frames)
    return request


# The estimate


@pytest.mark.parametrize(
    "settings, weights", [(ONE(), 2.64 + 0.16 + 1.18), (TWO(), 2.64 + 0.16 + 0.66)], ids=["one", "two"]
)
def test_the_published_networks_have_their_weights(settings, weights):
    estimate = estimate_memory(settings, settings.frame_size, 32, 32)
    assert estimate.weights / GIB == pytest.approx(weights, rel=0.02)
    assert estimate.networks == estimate.weights + estimate.activations
    one_at_a_time = estimate_memory(settings, settings.frame_size, 32, 32, low_memory=True)
    assert one_at_a_time.weights / GIB == pytest.approx(2.64, rel=0.02)  # the UNet's


@functools.lru_cache(maxsize=None)
def unet_peak(stage: type, dtype: torch.dtype = torch.float16, latent: tuple[int, int] | None = None) -> int:
    """Bytes that a guided call of a stage's published UNet holds at its peak."""
    settings = stage()
    with torch.device("meta"), torch.no_grad():
        unet = channels_last(UNet(settings.unet, flash_attention).to(dtype))
        y = torch.empty(1, 1 if stage is ONE else 77, 1024)
        y = torch.cat([y, y]) if stage is ONE else y  # both branches in one pass, or one after the other
        latent = latent or (settings.latent_hei, settings.latent_wid)
        x, t = torch.empty(1, 4, settings.max_frames, *latent), torch.empty(1)
        chunk = chunk_of(torch.device("cuda"), low_memory=False)
        with LiveMemory(unet) as memory:
            unet(x, t, y, chunk=chunk)
    return memory.peak


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", [ONE, TWO], ids=["one", "two"])
def test_the_estimate_covers_what_the_unet_holds(stage, dtype):
    settings = stage(decoder_bs=1, precision=precision_name(dtype))
    estimate = estimate_memory(settings, settings.frame_size, 32, 32).activations
    assert 0.75 * estimate < unet_peak(stage, dtype) <= estimate


def test_both_stages_live_on_one_card_of_12_gib():
    """And one of 7 GiB does for either, one network at a time, by the tensors that are held."""
    one, two = (estimate_memory(each, each.frame_size, 32, 32) for each in (ONE(), TWO()))
    shared = 0.16 * GIB  # the autoencoder
    workspace = 0.8 * GIB  # of CUDA and cuDNN
    assert one.weights + two.weights - shared + max(one.activations, two.activations) + workspace < 12 * GIB
    assert one.weights + two.weights - shared + max(unet_peak(ONE), unet_peak(TWO)) + workspace < 11.2 * GIB
    for each in (ONE(), TWO()):
        low = estimate_memory(each, each.frame_size, 32, 32, low_memory=True)
        assert low.networks + workspace < 7 * GIB


@pytest.mark.slow
def test_4k_in_tiles_lives_on_one_card_of_12_gib_and_of_8_in_low_memory_mode(monkeypatch):
    """By the estimate, and by the tensors that are held; the frames themselves are in the host's memory."""
    monkeypatch.setattr(autoencoder, "sdpa_attention", flash_attention)
    settings, size, workspace = TWO(), (3840, 2160), 0.8 * GIB
    (rows, columns), _ = TileLimit(1024).layout(1024, settings.unet, 8)
    with torch.device("meta"), torch.no_grad():
        network = channels_last(autoencoder.Autoencoder(settings.autoencoder).half())
        with LiveMemory(network) as memory:
            decode_in_strips(network, torch.empty(1, 4, 270, 480))
    counted = max(unet_peak(TWO, latent=(rows, columns)), memory.peak)
    whole = estimate_memory(settings, size, 32, 32, tile=1024)
    assert whole.weights + counted + workspace < 12 * GIB and whole.networks + workspace < 12 * GIB
    assert 0.75 * whole.activations < counted < 1.05 * whole.activations
    low = estimate_memory(settings, size, 32, 32, low_memory=True, tile=1024)
    unet, of_autoencoder = 2.64 * GIB, 0.16 * GIB
    assert low.networks + workspace < 8 * GIB
    assert (
        max(unet + unet_peak(TWO, latent=(rows, columns)), of_autoencoder + memory.peak) + workspace < 8 * GIB
    )
    assert estimate_memory(settings, size, 32, 32).networks > 20 * GIB  # which is why


def test_one_frame_of_the_autoencoder():
    settings = TWO(decoder_bs=1)
    one_frame = estimate_memory(settings, (1280, 720), 1, 1).activations
    assert one_frame / GIB == pytest.approx(1.8, rel=0.02)
    settings.decoder_bs = 8
    assert estimate_memory(settings, (1280, 720), 8, 1).activations == pytest.approx(8 * one_frame, rel=0.01)


def test_the_estimate_follows_window_size_width_and_precision():
    settings, size = TWO(decoder_bs=1), (1280, 720)
    base = estimate_memory(settings, size, 64, 32)
    assert estimate_memory(settings, size, 1000, 32).networks == base.networks  # flat beyond the window
    assert estimate_memory(settings, size, 32, 10_000).networks == base.networks  # there is no more to see
    assert estimate_memory(settings, size, 640, 32).frames == 10 * base.frames
    assert estimate_memory(settings, size, 64, 64).activations > 1.5 * base.activations
    assert estimate_memory(settings, (2560, 1440), 64, 32).activations > 3 * base.activations
    full = estimate_memory(TWO(precision="fp32", decoder_bs=1), size, 64, 32)
    assert (full.weights, full.networks) == (2 * base.weights, pytest.approx(2 * base.networks))
    narrow = TWO(unet=UNetConfig(image_conditioned=False, row_padding=2, dim=64), decoder_bs=1)
    assert estimate_memory(narrow, size, 64, 32).activations < 0.8 * base.activations
    assert (
        estimate_memory(narrow, size, 64, 32).activations
        < 0.55 * estimate_memory(TWO(), size, 64, 32).activations
    )


def test_the_estimate_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    memory_in_words(ONE(), (448, 256), 32, 32)
    assert torch.equal(before, torch.get_rng_state())


# The limits

REFUSED = [
    (ONE(), None, {"resolution": (8192, 8192)},
     ("resolution: got 8192x8192, 67,108,864 pixels; limit_pixels allows 9,437,184",
      "8192x8192 and 32 frames take about", "in half precision (twice that in fp32)")),
    (ONE(latent_wid=1024, latent_hei=1024), None, {}, ("got 8192x8192", "limit_pixels")),
    (TWO(), None, {"resolution": (4097, 2304)}, ("got 4097x2304", "limit_pixels allows 9,437,184")),
    (ONE(), None, {"max_frames": 1025},
     ("max_frames: got 1,025; limit_frames allows 1,024", "448x256 and 1,025 frames take about 24 GiB",
      "raise limit_frames: in configuration.json, as a keyword of pipeline(), or as pipe.model.cfg.limit_f")),
    (ONE(), None, {"max_frames": 2000, "chunk_size": 32}, ("2,000 frames, 32 at a time, take about 5.8",)),
    (TWO(precision="fp32"), 1025, {}, ("video: has 1,025 frames or more; limit_frames allows 1,024",
                                       "32 at a time, take about 14 GiB for the networks in fp32 and 32")),
    (ONE(limit_steps=500), None, {"steps": 501}, ("steps: got 501; limit_steps allows 500", "GiB")),
    (TWO(limit_steps=20), None, {}, ("steps: got 30; limit_steps allows 20", "1280x720 and 32 frames")),
]  # fmt: skip


@pytest.mark.parametrize("settings, frames, keywords, parts", REFUSED)
def test_what_goes_beyond_a_limit_is_refused_with_the_memory_it_takes(settings, frames, keywords, parts):
    with pytest.raises(InvalidInputError) as refusal:
        requested(settings, frames, **keywords)
    assert all(part in str(refusal.value) for part in parts), str(refusal.value)


@pytest.mark.parametrize("settings, frames, keywords, parts", REFUSED)
def test_every_limit_can_be_raised(tmp_path, settings, frames, keywords, parts):
    raised = {"limit_pixels": 8192**2, "limit_frames": 100_000, "limit_steps": 1000}
    assigned = dataclasses.replace(settings)
    for name, value in raised.items():
        setattr(assigned, name, value)
    requested(assigned, frames, **keywords)
    contents = {"task": settings.stage, "model": {"model_cfg": {**raised, "latent_wid": 1024}}}
    (tmp_path / "configuration.json").write_text(json.dumps(contents), encoding="utf-8")
    requested(load_settings(tmp_path, settings.stage), frames, **keywords)
    requested(load_settings(tmp_path, settings.stage, raised), frames, **keywords)


def test_what_is_just_within_the_limits_is_taken():
    requested(ONE(), resolution=(4096, 2304), max_frames=1024, steps=1000)
    requested(TWO(), 1024, resolution=(4096, 2304), steps=1000)


def test_stage_twos_max_frames_is_a_window_and_not_limited():
    settings = TWO()
    settings.max_frames = 10_000
    assert requested(settings, 32).window == 10_000
    assert requested(settings, 32, chunk_size=5000, overlap_size=8).window == 5000


def test_a_limit_is_no_keyword_of_a_call():
    with pytest.raises(InvalidInputError, match="no keyword 'limit_frames'"):
        check_keywords(ONE.stage, {"limit_frames": 5000})
