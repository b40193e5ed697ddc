"""The UNet: the published computation, its parameters' names, and what its layers may and may not mix."""

from __future__ import annotations

import dataclasses
import math
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_fixture, load_json, relative_error
from make_small_model import random_weight
from tiny_networks import STAGE_TWO, STAGES, TINY, built, inputs_of, normal, with_random_weights
from torch import nn

from modelscope_i2v.errors import ConfigurationError, InvalidInputError
from modelscope_i2v.models import attention
from modelscope_i2v.models.attention import ATTENTION_CHOICES, sdpa_attention, select_attention
from modelscope_i2v.models.blocks import Downsample, ResidualBlock, TemporalConvolution, Upsample
from modelscope_i2v.models.conditioning import Conditioning
from modelscope_i2v.models.transformers import (
    GEGLU,
    Attention,
    SpatialTransformer,
    TemporalTransformer,
    TransformerBlock,
)
from modelscope_i2v.models.unet import UNet, UNetConfig, sinusoidal_embedding

pytestmark = pytest.mark.usefixtures("without_gradients")

FRAMES, HEIGHT, WIDTH = 3, 4, 5


def context_tokens(batch: int = 1, tokens: int = 6) -> torch.Tensor:
    return normal(batch, tokens, 24, seed=6)


def conditioning(batch: int = 1) -> Conditioning:
    return Conditioning(normal(batch, 128, seed=5), context_tokens(batch), FRAMES)


def of_sample(whole: Conditioning, index: int, frames: int) -> Conditioning:
    """The conditioning of one sample, with so many frames."""
    sample = slice(index, index + 1)
    return Conditioning(whole.embedding[sample], whole.context[sample], frames)


@pytest.fixture(scope="module")
def stage_one() -> UNet:
    return built(UNetConfig(**TINY))


@pytest.fixture(scope="module")
def stage_two() -> UNet:
    return built(UNetConfig(**TINY, **STAGE_TWO))


# The published computation


def test_random_weights_follow_the_fixtures_rule():
    shapes = {
        "input_blocks.0.0.weight": (32, 4, 3, 3),
        "time_embed.2.weight": (16, 8),
        "out.0.weight": (32,),
        "out.2.bias": (4,),
        "logit_scale": (),
    }
    for name, shape in shapes.items():
        crc = zlib.crc32(name.encode("utf-8"))
        for seed in (0, 3):
            generator = np.random.Generator(np.random.Philox(key=np.array([crc, seed], dtype=np.uint64)))
            n = generator.standard_normal(shape, dtype=np.float32)
            if len(shape) >= 2:
                expected = n / np.sqrt(np.prod(shape[1:]))
            elif name.endswith("weight"):
                expected = 1 + 0.1 * n
            else:
                expected = 0.02 * n if shape else 1.0
            np.testing.assert_allclose(random_weight(name, shape, seed), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", STAGES)
def test_output_is_the_published_one(name):
    meta, fixture = load_json("meta"), load_fixture(name)
    names = [field.name for field in dataclasses.fields(UNetConfig) if field.name in meta[name]]
    architecture = {key: tuple(v) if isinstance(v := meta[name][key], list) else v for key in names}
    unet = built(UNetConfig(**architecture, **STAGES[name]), meta["seed"])
    inputs = {key: torch.from_numpy(value) for key, value in fixture.items() if key != "out"}
    assert relative_error(unet(**inputs), fixture["out"]) < 1e-5


@pytest.mark.parametrize("name", STAGES)
def test_full_size_parameters_are_the_published_ones(name):
    with torch.device("meta"):
        unet = UNet(UNetConfig(**STAGES[name]))
    ours = [(key, list(value.shape)) for key, value in unet.state_dict().items()]
    assert ours == list(load_json("state_dicts")[name].items())
    assert not list(unet.buffers())


# Pieces against their formulas


def test_sinusoidal_embedding():
    t, dim = torch.tensor([0, 1, 17, 999]), 12
    expected = np.zeros((4, dim))
    for row, value in enumerate(t.tolist()):
        for i in range(dim // 2):
            angle = value * 10000 ** (-i / (dim // 2))
            expected[row, i], expected[row, dim // 2 + i] = math.cos(angle), math.sin(angle)
    embedding = sinusoidal_embedding(t, dim)
    assert embedding.dtype == torch.float32
    np.testing.assert_allclose(embedding.numpy(), expected, atol=2e-5)
    assert embedding[0].tolist() == [1.0] * 6 + [0.0] * 6


def test_attention_is_softmax_of_scaled_products():
    q, k, v = normal(2, 5, 3, 8), normal(2, 7, 3, 8, seed=1), normal(2, 7, 3, 8, seed=2)
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(8)).softmax(-1)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    assert relative_error(sdpa_attention(q, k, v), expected) < 1e-6


def test_the_order_of_torchs_kernels_is_set_for_the_call_only():
    """As for long sequences on a Hopper GPU, of which there need not be one here."""
    q = normal(1, 5, 3, 8)
    expected = sdpa_attention(q, q, q)
    try:
        with attention._cudnn_first():
            assert relative_error(sdpa_attention(q, q, q), expected) < 1e-6
            order = torch._C._get_sdp_priority_order()
    except TypeError:
        pytest.skip("torch cannot be cond an order before 2.6")
    assert order[0] == torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value
    assert torch._C._get_sdp_priority_order()[0] != order[0]


def test_attention_heads_are_consecutive_channels():
    layer = with_random_weights(Attention(12, 10, 3, sdpa_attention))
    x, context = normal(2, 5, 12), normal(2, 7, 10, seed=1)
    q, k, v = x @ layer.to_q.weight.T, context @ layer.to_k.weight.T, context @ layer.to_v.weight.T
    heads = []
    for start in (0, 4, 8):
        part = slice(start, start + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(-1)
        heads.append(weights @ v[..., part])
    assert relative_error(layer(x, context), layer.to_out(torch.cat(heads, -1))) < 1e-6
    assert [name for name, _ in layer.named_parameters() if name.endswith("bias")] == ["to_out.0.bias"]


def test_geglu_multiplies_the_first_half_by_the_exact_gelu_of_the_second():
    layer = with_random_weights(GEGLU(6, 10))
    x = 3 * normal(4, 6)
    value, gate = (x @ layer.proj.weight.T + layer.proj.bias).split(10, dim=-1)
    expected = value * 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    assert relative_error(layer(x), expected) < 1e-6


@pytest.mark.parametrize("row_padding", [1, 2])
def test_downsample_pads_rows(row_padding):
    layer, x = with_random_weights(Downsample(3, row_padding)), normal(2, 3, 10, 8)
    padded = F.pad(x, (1, 1, row_padding, row_padding))
    expected = F.conv2d(padded, layer.op.weight, layer.op.bias, stride=2)
    assert expected.shape[2:] == (5 + row_padding - 1, 4)
    assert torch.equal(layer(x, conditioning()), expected)


@pytest.mark.parametrize("row_padding", [1, 2])
def test_upsample_repeats_pixels_and_drops_surplus_rows(row_padding):
    layer, x = with_random_weights(Upsample(3, row_padding)), normal(2, 3, 6, 4)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    if row_padding == 2:
        repeated = repeated[:, :, 1:-1]
    expected = F.conv2d(repeated, layer.conv.weight, layer.conv.bias, padding=1)
    assert torch.equal(layer(x, conditioning()), expected)


def test_stages_share_their_architecture():
    assert UNetConfig(**STAGE_TWO) == dataclasses.replace(UNetConfig(), **STAGE_TWO)
    with torch.device("meta"):
        one, two = (UNet(UNetConfig(**TINY, **given)).state_dict() for given in STAGES.values())
    only_in_one = [key for key in one if key not in two]
    assert {key.split(".")[0] for key in only_in_one} == {"context_embedding", "fps_embedding"}
    assert [key for key in one if key not in only_in_one] == list(two)


# What the layers mix


def spatial_layer() -> SpatialTransformer:
    return with_random_weights(SpatialTransformer(32, 2, 24, sdpa_attention))


def temporal_layer() -> TemporalTransformer:
    return with_random_weights(TemporalTransformer(32, 3, 16, sdpa_attention))


def permuted_frames(x: torch.Tensor, order: list[int]) -> torch.Tensor:
    """(b f) c h w with the frames of every video in another order."""
    return x.reshape(-1, len(order), *x.shape[1:])[:, order].flatten(0, 1)


@pytest.mark.parametrize("layer", [spatial_layer, temporal_layer], ids=["spatial", "temporal"])
def test_transformers_do_not_know_the_order_of_frames(layer):
    layer, x = layer(), normal(2 * FRAMES, 32, HEIGHT, WIDTH)
    cond = conditioning(2)
    order = [2, 0, 1]
    expected = permuted_frames(layer(x, cond), order)
    assert relative_error(layer(permuted_frames(x, order), cond), expected) < 1e-6


@pytest.mark.parametrize("layer", [spatial_layer, temporal_layer], ids=["spatial", "temporal"])
def test_transformers_do_not_know_the_order_of_pixels(layer):
    layer, x = layer(), normal(2 * FRAMES, 32, HEIGHT, WIDTH)
    cond = conditioning(2)
    order = torch.randperm(HEIGHT * WIDTH, generator=torch.Generator().manual_seed(0))

    def permuted(video: torch.Tensor) -> torch.Tensor:
        return video.flatten(2)[:, :, order].reshape_as(video)

    assert relative_error(layer(permuted(x), cond), permuted(layer(x, cond))) < 1e-6


def test_spatial_transformer_sees_one_frame_and_its_videos_context():
    layer = spatial_layer()
    cond, x = conditioning(2), normal(2 * FRAMES, 32, HEIGHT, WIDTH)
    together = layer(x, cond)
    for index in range(2 * FRAMES):
        alone = layer(x[index : index + 1], of_sample(cond, index // FRAMES, 1))
        assert relative_error(together[index : index + 1], alone) < 1e-6


def test_temporal_transformer_sees_all_frames_of_one_pixel():
    layer, cond = temporal_layer(), conditioning()
    layer.norm = nn.Identity()  # which takes its statistics over all pixels
    x = normal(FRAMES, 32, HEIGHT, WIDTH)
    changed = x.clone()
    changed[1, :, 2, 3] += 1
    moved = (layer(changed, cond) - layer(x, cond)).abs().amax(1) > 1e-6
    expected = torch.zeros(FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    expected[:, 2, 3] = True
    assert torch.equal(moved, expected)


def test_temporal_transformer_ignores_the_conditioning():
    layer, x = temporal_layer(), normal(FRAMES, 32, HEIGHT, WIDTH)
    other = Conditioning(normal(1, 128, seed=8), normal(1, 6, 24, seed=7), FRAMES)
    assert torch.equal(layer(x, conditioning()), layer(x, other))


#: So small that the norms' eps shows.
FAINT = 3e-3


def test_spatial_transformer_formula():
    """Its norm takes its statistics over a frame's h and w."""
    layer, x = spatial_layer(), FAINT * normal(2 * FRAMES, 32, HEIGHT, WIDTH)
    cond = conditioning(2)
    parameters = dict(layer.named_parameters())
    tokens = F.group_norm(x, 32, parameters["norm.weight"], parameters["norm.bias"], eps=1e-6)
    tokens = tokens.flatten(2).transpose(1, 2)
    tokens = F.linear(tokens, parameters["proj_in.weight"], parameters["proj_in.bias"])
    tokens = layer.transformer_blocks[0](tokens, cond.context)
    tokens = F.linear(tokens, parameters["proj_out.weight"], parameters["proj_out.bias"])
    assert relative_error(layer(x, cond), x + tokens.transpose(1, 2).reshape_as(x)) < 1e-6


def test_temporal_transformer_formula():
    """Its norm takes its statistics over a video's f, h and w."""
    layer, x = temporal_layer(), FAINT * normal(2 * FRAMES, 32, HEIGHT, WIDTH)
    parameters = dict(layer.named_parameters())
    video = x.reshape(2, FRAMES, 32, HEIGHT, WIDTH).transpose(1, 2)
    tokens = F.group_norm(video, 32, parameters["norm.weight"], parameters["norm.bias"], eps=1e-6)
    tokens = tokens.permute(0, 3, 4, 1, 2).flatten(0, 2)  # b c f h w -> (b h w) c f
    tokens = F.conv1d(tokens, parameters["proj_in.weight"], parameters["proj_in.bias"])
    plain = TransformerBlock(48, 3, sdpa_attention)  # over the second axis
    plain.load_state_dict(layer.transformer_blocks[0].state_dict())
    tokens = plain(tokens.transpose(1, 2)).transpose(1, 2)
    tokens = F.conv1d(tokens, parameters["proj_out.weight"], parameters["proj_out.bias"])
    change = tokens.reshape(2, HEIGHT, WIDTH, 32, FRAMES).permute(0, 4, 3, 1, 2).flatten(0, 1)
    assert relative_error(layer(x, conditioning(2)), x + change) < 1e-6


def test_transformer_block_formula():
    block = with_random_weights(TransformerBlock(32, 2, sdpa_attention, 24))
    x, context = normal(2, 5, 32), normal(2, 7, 24, seed=1)
    h = x + block.attn1(block.norm1(x))
    h = h + block.attn2(block.norm2(h), context)
    assert relative_error(block(x, context), h + block.ff(block.norm3(h))) < 1e-6
    block = with_random_weights(TransformerBlock(32, 2, sdpa_attention))
    h = x + block.attn1(block.norm1(x))
    h = h + block.attn2(block.norm2(h))  # without a context, to itself
    assert relative_error(block(x), h + block.ff(block.norm3(h))) < 1e-6


def temporal_convolution_by_formula(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    video = x.reshape(-1, FRAMES, *x.shape[1:]).transpose(1, 2)
    h = video
    for name, index in (("conv1", 2), ("conv2", 3), ("conv3", 3), ("conv4", 3)):
        weight, bias = parameters[f"{name}.{index}.weight"], parameters[f"{name}.{index}.bias"]
        h = F.group_norm(h, 32, parameters[f"{name}.0.weight"], parameters[f"{name}.0.bias"], eps=1e-5)
        h = F.conv3d(F.silu(h), weight, bias, padding=(1, 0, 0))
    return x + h.transpose(1, 2).reshape_as(x)


def test_temporal_convolution_formula():
    """Its norms take their statistics over a video's f, h and w."""
    layer, x = with_random_weights(TemporalConvolution(32)), FAINT * normal(2 * FRAMES, 32, HEIGHT, WIDTH)
    expected = temporal_convolution_by_formula(dict(layer.named_parameters()), x)
    assert relative_error(layer(x, FRAMES), expected) < 1e-6


def residual_block() -> ResidualBlock:
    return with_random_weights(ResidualBlock(32, 128, 64))


def test_residual_block_without_its_temporal_part_treats_frames_independently():
    block, cond = residual_block(), conditioning(2)
    block.temopral_conv.conv4[-1].weight.zero_()
    block.temopral_conv.conv4[-1].bias.zero_()
    x = normal(2 * FRAMES, 32, HEIGHT, WIDTH)
    together = block(x, cond)
    for index in range(2 * FRAMES):
        alone = block(x[index : index + 1], of_sample(cond, index // FRAMES, 1))
        assert relative_error(together[index : index + 1], alone) < 1e-6


def test_residual_block_formula():
    block, cond = residual_block(), conditioning(2)
    x = FAINT * normal(2 * FRAMES, 32, HEIGHT, WIDTH)
    parameters = dict(block.named_parameters())

    def normed(h, name):
        return F.silu(F.group_norm(h, 32, parameters[f"{name}.weight"], parameters[f"{name}.bias"], eps=1e-5))

    def convolved(h, name, padding):
        return F.conv2d(h, parameters[f"{name}.weight"], parameters[f"{name}.bias"], padding=padding)

    embedding = F.silu(cond.embedding) @ parameters["emb_layers.1.weight"].T + parameters["emb_layers.1.bias"]
    h = convolved(normed(x, "in_layers.0"), "in_layers.2", 1)
    h = h + embedding.repeat_interleave(FRAMES, 0).view(-1, 64, 1, 1)
    h = convolved(normed(h, "out_layers.0"), "out_layers.3", 1)
    h = h + convolved(x, "skip_connection", 0)
    temporal = {name[14:]: value for name, value in parameters.items() if name.startswith("temopral_conv.")}
    assert relative_error(block(x, cond), temporal_convolution_by_formula(temporal, h)) < 1e-6


def test_temporal_convolution_reaches_four_frames_at_the_same_pixel():
    layer = with_random_weights(TemporalConvolution(32))
    for part in (layer.conv1, layer.conv2, layer.conv3, layer.conv4):
        part[0] = nn.Identity()  # the norms, which take their statistics over all frames
    x = normal(11, 32, 2, 3)
    changed = x.clone()
    changed[5, :, 1, 2] += 10
    moved = (layer(changed, 11) - layer(x, 11)).abs().amax(1) > 1e-6
    expected = torch.zeros(11, 2, 3, dtype=torch.bool)
    expected[1:10, 1, 2] = True  # four to either side
    assert torch.equal(moved, expected)


def test_temporal_convolution_adds_to_its_input():
    layer, x = with_random_weights(TemporalConvolution(32)), normal(FRAMES, 32, 2, 3)
    assert relative_error(layer(x, FRAMES), x) > 0.1
    layer.conv4[-1].weight.zero_()
    layer.conv4[-1].bias.zero_()
    assert torch.equal(layer(x, FRAMES), x)


def test_time_runs_backwards_when_the_temporal_kernels_do(stage_one):
    """Nothing but the kernels of the temporal convolutions tells past from future."""
    reversed_unet = built(stage_one.config)
    kernels = [value for value in reversed_unet.parameters() if value.ndim == 5]
    assert len(kernels) == sum(4 for module in stage_one.modules() if isinstance(module, ResidualBlock))
    for kernel in kernels:
        kernel.copy_(kernel.flip(2))
    inputs = inputs_of(stage_one, 1, 4, 16, 16)
    backwards = {**inputs, "x": inputs["x"].flip(2)}
    assert relative_error(reversed_unet(**backwards).flip(2), stage_one(**inputs)) < 1e-4
    assert relative_error(stage_one(**backwards).flip(2), stage_one(**inputs)) > 1e-2


@pytest.mark.parametrize("stage", ["stage_one", "stage_two"])
def test_batch_of_two_is_two_singles(stage, request):
    unet = request.getfixturevalue(stage)
    inputs = inputs_of(unet, 2, FRAMES, 18, 16)
    together = unet(**inputs)
    assert together.shape == inputs["x"].shape
    for index in range(2):
        alone = unet(**{name: value[index : index + 1] for name, value in inputs.items()})
        assert relative_error(together[index : index + 1], alone) < 1e-4
    assert relative_error(together[:1], together[1:]) > 0.1


@pytest.mark.parametrize("stage", ["stage_one", "stage_two"])
def test_every_input_matters(stage, request):
    unet = request.getfixturevalue(stage)
    inputs = inputs_of(unet, 1, FRAMES, 10, 8)
    reference = unet(**inputs)
    for name, value in inputs.items():
        assert relative_error(unet(**{**inputs, name: value + 1}), reference) > 1e-4, name


def test_training_mode_changes_nothing():
    unet = built(UNetConfig(**TINY))
    inputs = inputs_of(unet, 1, 2, 8, 8)
    expected = unet(**inputs)
    assert torch.equal(unet.train()(**inputs), expected)


def test_attention_function_is_the_one_given():
    calls = []

    def attend(q, k, v):
        calls.append(q.shape)
        return sdpa_attention(q, k, v)

    config = UNetConfig(**TINY)
    unet = built(config, attend=attend)
    inputs = inputs_of(unet, 1, FRAMES, 8, 8)
    assert torch.equal(unet(**inputs), built(config)(**inputs))
    transformers = [m for m in unet.modules() if isinstance(m, (SpatialTransformer, TemporalTransformer))]
    assert len(calls) == 2 * len(transformers)
    assert all(shape[3] == config.head_dim for shape in calls)


def test_unknown_attention_is_refused():
    assert select_attention("auto") is select_attention("sdpa") is sdpa_attention
    with pytest.raises(ConfigurationError) as refusal:
        select_attention("flash")
    assert str(refusal.value) == f"attention: got 'flash', allowed are {', '.join(ATTENTION_CHOICES)}"


def test_output_has_the_parameters_dtype(stage_two):
    inputs = inputs_of(stage_two, 1, 2, 10, 8)
    half = built(stage_two.config).bfloat16()
    output = half(**inputs)
    assert output.dtype == torch.bfloat16
    assert relative_error(output.float(), stage_two(**inputs)) < 0.05


def test_frame_rate_defaults_to_the_configurations(stage_one):
    inputs = inputs_of(stage_one, 2, 2, 8, 8)
    del inputs["fps"]
    at = {fps: stage_one(**inputs, fps=torch.tensor([fps, fps])) for fps in (8, 12)}
    assert relative_error(at[8], at[12]) > 1e-4
    assert torch.equal(stage_one(**inputs), at[8])
    other = built(dataclasses.replace(stage_one.config, default_fps=12))
    assert torch.equal(other(**inputs), at[12])


# Sizes


def meets_its_skips(length: int, levels: int, row_padding: int, rows: bool) -> bool:
    """Whether a length comes back from really down- and upsampling it, at every level."""
    with torch.device("meta"):
        down, up = Downsample(1, row_padding), Upsample(1, row_padding)
        x = torch.empty(1, 1, length, 8) if rows else torch.empty(1, 1, 8, length)
    axis, skips = (2 if rows else 3), []
    for _ in range(levels - 1):
        skips.append(x.shape[axis])
        x = down(x, conditioning())
    while skips:
        x = up(x, conditioning())
        if x.shape[axis] != skips.pop():
            return False
    return True


@pytest.mark.parametrize("levels, row_padding", [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (4, 2)])
def test_padded_size_is_the_smallest_that_comes_back(levels, row_padding):
    config = UNetConfig(dim_mult=(1,) * levels, row_padding=row_padding, image_conditioned=row_padding == 1)
    largest = 36
    heights = [n for n in range(1, largest) if meets_its_skips(n, levels, row_padding, rows=True)]
    widths = [n for n in range(1, largest) if meets_its_skips(n, levels, row_padding, rows=False)]
    for length in range(1, widths[-1] - 8):
        expected = (
            min(height for height in heights if height >= length),
            min(width for width in widths if width >= length),
        )
        assert config.padded_size(length, length) == expected
        assert config.padded_size(*expected) == expected


def test_published_sizes_need_no_padding():
    assert UNetConfig().padded_size(32, 56) == (32, 56)
    assert UNetConfig(**STAGE_TWO).padded_size(90, 160) == (90, 160)
    assert UNetConfig(**STAGE_TWO).padded_size(91, 161) == (98, 168)


@pytest.mark.parametrize("stage", ["stage_one", "stage_two"])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 8), (3, 17), (10, 16), (11, 15), (19, 9)])
def test_any_size_goes_through(stage, height, width, request):
    unet = request.getfixturevalue(stage)
    inputs = inputs_of(unet, 1, 1, height, width)
    output = unet(**inputs)
    assert output.shape == inputs["x"].shape
    assert output.isfinite().all()


@pytest.mark.parametrize(
    "stage, height, width", [("stage_one", 7, 13), ("stage_two", 9, 15), ("stage_two", 1, 8)]
)
def test_other_sizes_are_padded_by_their_edge_and_cropped(stage, height, width, request):
    unet = request.getfixturevalue(stage)
    inputs = inputs_of(unet, 1, 2, height, width)
    rows, columns = unet.config.padded_size(height, width)
    assert (rows, columns) != (height, width)
    x = inputs["x"]
    x = torch.cat([x, x[..., -1:, :].expand(-1, -1, -1, rows - height, -1)], dim=-2)
    x = torch.cat([x, x[..., -1:].expand(-1, -1, -1, -1, columns - width)], dim=-1)
    expected = unet(**{**inputs, "x": x})[..., :height, :width]
    assert torch.equal(unet(**inputs), expected)


# Refusals


@pytest.mark.parametrize(
    "stage, name, shape, message",
    [
        ("stage_one", "x", (1, 4, 8, 8), "UNet: x must be [B, 4, F, h, w], got [1, 4, 8, 8]"),
        ("stage_one", "x", (1, 3, 2, 8, 8), "UNet: x must be [B, 4, F, h, w], got [1, 3, 2, 8, 8]"),
        ("stage_one", "t", (), "UNet: t must be [1], got []"),
        ("stage_one", "t", (2,), "UNet: t must be [1], got [2]"),
        ("stage_one", "y", (1, 24), "UNet: y must be [1, 1, 24], got [1, 24]"),
        (
            "stage_one",
            "y",
            (1, 2, 24),
            "UNet: y must be [1, 1, 24], got [1, 2, 24]",
        ),
        (
            "stage_one",
            "y",
            (0, 1, 24),
            "UNet: y must be [1, 1, 24], got [0, 1, 24]",
        ),
        (
            "stage_two",
            "y",
            (1, 9, 23),
            "UNet: y must be [1, N, 24], got [1, 9, 23]",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(stage, name, shape, message, request):
    unet = request.getfixturevalue(stage)
    with pytest.raises(InvalidInputError) as refusal:
        unet(**{**inputs_of(unet, 1, 2, 8, 8), name: torch.zeros(shape)})
    assert str(refusal.value) == message


@pytest.mark.parametrize("shape", [(3,), (2, 1)])
def test_frame_rates_that_do_not_fit_are_refused(shape, stage_one):
    with pytest.raises(InvalidInputError, match="fps"):
        stage_one(**{**inputs_of(stage_one, 2, 2, 8, 8), "fps": torch.full(shape, 8)})


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"image_conditioned": False, "y_dim": 512},
            "UNet: y_dim 512 and context_dim 1024 must be equal in stage two",
        ),
        ({"dim": 33}, "UNet: dim must be even, got 33"),
        ({"dim": 80}, "UNet: dim x dim_mult[0] is 80, and must be a multiple of num_groups 32"),
        (
            {"dim": 32, "dim_mult": (2, 1), "head_dim": 64},
            "UNet: dim x dim_mult[1] is 32, and must be a multiple of head_dim 64",
        ),
    ],
)
def test_architectures_that_cannot_be_are_refused(given, message):
    with pytest.raises(ConfigurationError) as refusal:
        UNetConfig(**given)
    assert str(refusal.value) == message


def test_middle_block_needs_whole_heads_too():
    """The middle block attends whatever ``attn_scales`` says: its width must be a multiple of head_dim."""
    with pytest.raises(ConfigurationError, match="head_dim 64"):
        UNetConfig(dim=32, dim_mult=(1, 2, 1), head_dim=64, attn_scales=(0.5,))


def test_levels_without_attention_need_no_whole_heads():
    config = UNetConfig(**{**TINY, "dim": 32, "dim_mult": (1, 2), "head_dim": 64, "attn_scales": (0.5,)})
    unet = built(config)
    inputs = inputs_of(unet, 1, 2, 8, 8)
    assert unet(**inputs).shape == inputs["x"].shape
