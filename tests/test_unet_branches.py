"""What the UNet saves, and that it changes nothing: shared work, contexts projected once, parts at a time."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from tiny_networks import STAGES, TINY, built, channels_last, inputs_of, normal
from torch import nn

from modelscope_i2v.models.layers import TemporalConv
from modelscope_i2v.models.transformers import GEGLU, SpatialTransformer
from modelscope_i2v.models.unet import UNet, UNetConfig

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


# Branches


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 2])
def test_branches_are_what_single_calls_give(unet, batch, size):
    inputs = inputs_of(unet, batch, 3, *size)
    y = inputs.pop("y")
    contexts = [unet.project_context(each) for each in (y, other_conditioning(y))]
    both = unet.branches(contexts=contexts, **inputs)
    assert len(both) == 2
    for branch, each in zip(both, (y, other_conditioning(y))):
        assert torch.equal(branch, unet(y=each, **inputs))
    assert relative_error(both[0], both[1]) > 1e-3


@pytest.mark.parametrize("batch", [1, 2])
def test_branches_in_one_pass_are_branches_one_after_the_other(unet, batch):
    inputs = inputs_of(unet, batch, 3, 16, 16)
    y = inputs.pop("y")
    context = unet.project_context(torch.cat([y, other_conditioning(y)]))
    (together,) = unet.branches(contexts=[context], **inputs)
    for branch, each in zip(together.chunk(2), (y, other_conditioning(y))):
        assert relative_error(branch, unet(y=each, **inputs)) < 1e-5


def test_what_precedes_the_context_is_computed_once_for_all_branches(unet):
    inputs = inputs_of(unet, 1, 2, 8, 8)
    contexts = [unet.project_context(inputs.pop("y"))] * 2
    temporal, feed_forwards = (
        sum(isinstance(layer, kind) for layer in unet.modules()) for kind in (TemporalConv, GEGLU)
    )
    run = lambda: unet.branches(contexts=contexts, **inputs)  # noqa: E731
    # Shared: the first residual block, with four temporal convolutions, and the first temporal transformer.
    assert counted(unet, TemporalConv, run) == 2 * temporal - 4
    assert counted(unet, GEGLU, run) == 2 * feed_forwards - 1


@pytest.mark.parametrize("attn_scales", [(0.5,), ()])
def test_branches_where_attention_begins_further_down(attn_scales):
    unet = built(UNetConfig(**{**TINY, "attn_scales": attn_scales}))
    inputs = inputs_of(unet, 1, 2, 16, 16)
    y = inputs.pop("y")
    contexts = [unet.project_context(each) for each in (y, other_conditioning(y))]
    for branch, each in zip(unet.branches(contexts=contexts, **inputs), (y, other_conditioning(y))):
        assert torch.equal(branch, unet(y=each, **inputs))


def test_a_context_is_projected_once(unet):
    inputs = inputs_of(unet, 1, 2, 8, 8)
    projections = {
        layer.transformer_blocks[0].attn2.to_k
        for layer in unet.modules()
        if isinstance(layer, SpatialTransformer)
    }
    calls = []
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in projections]
    contexts = [unet.project_context(inputs.pop("y"))]
    assert len(calls) == len(projections)
    unet.branches(contexts=contexts, **inputs)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(projections)


# Parts at a time


@pytest.mark.parametrize("chunk", [1, 3000, 20_000, 10**9])
@pytest.mark.parametrize("batch", [1, 2])
def test_parts_give_what_the_whole_gives(unet, batch, chunk):
    inputs = inputs_of(unet, batch, 5, 13, 16)
    whole = unet(**inputs)
    try:
        unet.chunk = chunk
        assert relative_error(unet(**inputs), whole) < 1e-5
    finally:
        unet.chunk = None


@pytest.mark.parametrize("chunk", [4_000, 40_000])
def test_no_feed_forward_passes_the_chunk(unet, chunk):
    inputs = inputs_of(unet, 1, 8, 16, 16)
    sizes = []
    hooks = [
        layer.proj.register_forward_hook(lambda _, __, output: sizes.append(output.numel()))
        for layer in unet.modules()
        if isinstance(layer, GEGLU)
    ]
    try:
        unet(**inputs)
        assert max(sizes) > chunk
        sizes.clear()
        unet.chunk = chunk
        unet(**inputs)
    finally:
        unet.chunk = None
        for hook in hooks:
            hook.remove()
    one_frame = 8 * 32 * 18 * 16  # what cannot be parted further, in stage two padded
    assert max(sizes) <= max(chunk, one_frame)


# Reuse of deep features


def test_features_of_the_same_step_give_the_same_prediction(unet):
    inputs = inputs_of(unet, 1, 3, 16, 16)
    y = inputs.pop("y")
    contexts = [unet.project_context(each) for each in (y, other_conditioning(y))]
    deep = []
    whole = unet.branches(contexts=contexts, deep=deep, **inputs)
    assert len(deep) == 2
    for again, branch in zip(unet.branches(contexts=contexts, deep=deep, **inputs), whole):
        assert torch.equal(again, branch)


def test_reuse_computes_the_outermost_blocks_only(unet):
    inputs = inputs_of(unet, 1, 3, 16, 16)
    contexts = [unet.project_context(inputs.pop("y"))]
    deep = []
    whole = unet.branches(contexts=contexts, deep=deep, **inputs)[0]
    moved = {**inputs, "x": inputs["x"] + 0.1 * normal(*inputs["x"].shape, seed=4)}
    run = lambda: unet.branches(contexts=contexts, deep=deep, **moved)  # noqa: E731
    assert counted(unet, TemporalConv, run) == 4  # those of the last block
    exact = unet.branches(contexts=contexts, **moved)[0]
    assert 0 < relative_error(run()[0], exact) < relative_error(whole, exact)
