"""What the UNet saves: work that several contexts share, memory by chunks, and deep features used again."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from tiny_networks import STAGES, TINY, built, channels_last, inputs_of, normal
from torch import nn

from modelscope_i2v.models.layers import TemporalConv
from modelscope_i2v.models.transformers import GEGLU
from modelscope_i2v.models.unet import FeatureCache, UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("without_gradients")

#: Two frames sizes, of which the second is padded.
SIZES = [(16, 16), (13, 11)]


@pytest.fixture(params=STAGES, scope="module")
def unet(request) -> UNet:
    return channels_last(built(UNetConfig(**TINY, **STAGES[request.param])))


def other_conditioning(y: torch.Tensor) -> torch.Tensor:
    return normal(*y.shape, seed=9)


def counted(unet: UNet, kind: type[nn.Module], run) -> int:
    """How often layers of a kind are called while something runs."""
    calls = []
    hooks = [
        layer.register_forward_hook(lambda *_: calls.append(1))
        for layer in unet.modules()
        if isinstance(layer, kind)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return len(calls)


# Several contexts


@pytest.mark.parametrize("chunk", [None, 20_000])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 2])
def test_several_contexts_in_one_call_are_one_call_each(unet, batch, size, chunk):
    inputs = inputs_of(unet, batch, 3, *size)
    y = inputs.pop("y")
    contexts = [y, other_conditioning(y), -y]
    together = unet(y=torch.cat(contexts), **inputs, chunk=chunk)
    for branch, each in zip(together.chunk(3), contexts):
        assert relative_error(branch, unet(y=each, **inputs)) < 1e-5
    assert relative_error(together[:batch], together[batch : 2 * batch]) > 1e-3


@pytest.mark.parametrize("attn_scales", [(0.5,), ()])
def test_contexts_where_attention_begins_further_down(attn_scales):
    unet = built(UNetConfig(**{**TINY, "attn_scales": attn_scales}))
    inputs = inputs_of(unet, 1, 2, 16, 16)
    y = inputs.pop("y")
    together = unet(y=torch.cat([y, other_conditioning(y)]), **inputs)
    for branch, each in zip(together.chunk(2), (y, other_conditioning(y))):
        assert relative_error(branch, unet(y=each, **inputs)) < 1e-5


def test_what_precedes_the_context_is_computed_once_for_all(unet):
    inputs = inputs_of(unet, 2, 3, 8, 8)
    y = inputs.pop("y")
    samples = []
    layers = [layer for layer in unet.modules() if isinstance(layer, TemporalConv)]
    hooks = [layer.register_forward_hook(lambda _, __, out: samples.append(len(out))) for layer in layers]
    unet(y=torch.cat([y, other_conditioning(y)]), **inputs)
    for hook in hooks:
        hook.remove()
    assert samples == [2] * 4 + [4] * (len(layers) - 4)  # the first residual block has four


# Chunks


@pytest.mark.parametrize("chunk", [1, 3000, 20_000, 10**9])
@pytest.mark.parametrize("batch", [1, 2])
def test_chunks_give_what_the_whole_gives(unet, batch, chunk):
    inputs = inputs_of(unet, batch, 5, 13, 16)
    assert relative_error(unet(**inputs, chunk=chunk), unet(**inputs)) < 1e-5


@pytest.mark.parametrize("chunk", [4_000, 40_000])
def test_no_feed_forward_passes_the_chunk(unet, chunk):
    inputs = inputs_of(unet, 1, 8, 16, 16)
    sizes = []
    hooks = [
        layer.proj.register_forward_hook(lambda _, __, output: sizes.append(output.numel()))
        for layer in unet.modules()
        if isinstance(layer, GEGLU)
    ]
    unet(**inputs)
    assert max(sizes) > chunk
    sizes.clear()
    unet(**inputs, chunk=chunk)
    for hook in hooks:
        hook.remove()
    one_frame = 8 * 32 * 18 * 16  # what cannot be parted further, in stage two padded
    assert max(sizes) <= max(chunk, one_frame)


# Reuse of deep features


@pytest.mark.parametrize("contexts", [1, 2])
def test_features_of_the_same_call_give_the_same_prediction(unet, contexts):
    inputs = inputs_of(unet, 1, 3, 16, 16)
    y = torch.cat([inputs.pop("y")] * contexts)
    cache = FeatureCache()
    whole = unet(y=y, cache=cache, **inputs)
    assert torch.equal(whole, unet(y=y, **inputs))
    assert torch.equal(unet(y=y, cache=cache, **inputs), whole)


def test_reuse_computes_the_outermost_blocks_only(unet):
    inputs = inputs_of(unet, 1, 3, 16, 16)
    cache = FeatureCache()
    whole = unet(**inputs, cache=cache)
    moved = {**inputs, "x": inputs["x"] + 0.1 * normal(*inputs["x"].shape, seed=4)}
    run = lambda: unet(**moved, cache=cache)  # noqa: E731
    assert counted(unet, TemporalConv, run) == 4  # those of the last block
    exact = unet(**moved)
    assert 0 < relative_error(run(), exact) < relative_error(whole, exact)
