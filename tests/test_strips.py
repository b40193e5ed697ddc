"""The autoencoder in strips of rows: the whole frame's result, in less memory."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from live_memory import LiveMemory, flash_attention
from tiny_networks import channels_last, normal, with_random_weights

from modelscope_i2v.models import autoencoder as networks
from modelscope_i2v.models.autoencoder import Autoencoder, AutoencoderConfig
from modelscope_i2v.models.strips import decode_in_strips, encode_in_strips

pytestmark = pytest.mark.usefixtures("without_gradients")
GIB = 2**30


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return with_random_weights(Autoencoder(AutoencoderConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1)))


@pytest.mark.parametrize("elements", [1, 3000, 20_000, 10**9])
@pytest.mark.parametrize("height, width", [(64, 40), (20, 24), (4, 4)])
def test_strips_give_the_whole_frames_result(autoencoder, elements, height, width):
    x = normal(1, 3, height, width) * torch.linspace(0.2, 2, height).view(-1, 1)  # unlike from row to row
    whole, ours = autoencoder.encode(x), encode_in_strips(autoencoder, x, elements)
    assert relative_error(ours.mean, whole.mean) < 1e-5
    assert relative_error(ours.logvar, whole.logvar) < 1e-5
    z = whole.mean
    assert relative_error(decode_in_strips(autoencoder, z, elements), autoencoder.decode(z)) < 1e-5


@pytest.mark.parametrize("dtype, allowed", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
def test_half_precision_agrees_to_its_rounding(dtype, allowed):
    model = with_random_weights(Autoencoder(AutoencoderConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1)))
    model.to(dtype)
    z = normal(1, 4, 12, 10)
    assert relative_error(decode_in_strips(model, z, 4000).float(), model.decode(z).float()) < allowed


def peak(model: Autoencoder, function, *shape: int) -> int:
    with torch.device("meta"), LiveMemory(model) as memory:
        function(torch.empty(*shape, dtype=model.dtype))
    return memory.peak


def test_a_4k_frame_takes_half_of_the_memory(monkeypatch):
    """The published autoencoder at 3840x2160 in half precision, by every tensor that is held."""
    monkeypatch.setattr(networks, "sdpa_attention", flash_attention)
    with torch.device("meta"):
        model = channels_last(Autoencoder(AutoencoderConfig()).half())
    decoding = peak(model, lambda z: decode_in_strips(model, z), 1, 4, 270, 480)
    encoding = peak(model, lambda x: encode_in_strips(model, x), 1, 3, 2160, 3840)
    assert decoding < 6.5 * GIB and encoding < 4.5 * GIB
    assert decoding < 0.55 * peak(model, model.decode, 1, 4, 270, 480)
