"""Where training starts: residual branches that add nothing, and an autoencoder that resamples already."""

from __future__ import annotations

import math
from typing import Any, Callable, Mapping, cast

import open_clip
import torch
from torch import Tensor, nn

from ..models import autoencoder as parts
from ..models.autoencoder import SCALE_FACTOR, Autoencoder
from ..models.blocks import ResidualBlock, TemporalConvolution
from ..models.transformers import SpatialTransformer, TemporalTransformer
from ..models.unet import UNet

_REFERENCE = 50.0  # constant channels beside which a group's others hardly change its statistics


@torch.no_grad()
def silence_branches(network: nn.Module) -> None:
    """Set the last layer of every residual branch to zero: each block starts as the identity."""
    for module in network.modules():
        if isinstance(module, parts.ResidualBlock):
            last: nn.Module = module.conv2
        elif isinstance(module, ResidualBlock):
            last = module.out_layers[3]
        elif isinstance(module, TemporalConvolution):
            last = module.conv4[-1]
        elif isinstance(module, (parts.AttentionBlock, SpatialTransformer, TemporalTransformer)):
            last = module.proj_out
        else:
            continue
        _clear(last)


@torch.no_grad()
def start_unet(unet: UNet) -> None:
    """Silent branches, and a prediction of zero."""
    silence_branches(unet)
    _clear(unet.out[2])


@torch.no_grad()
def start_as_scaling(unet: UNet, first: float, last: float) -> None:
    """Set a UNet to multiply its input with ``first`` and then ``last``, whatever timestep and context are.

    The input passes the first convolution, the last skip and the last norm unchanged, as in
    ``start_as_resampling``. The norm must have one group, with two channels more than
    twice the input's.
    """
    silence_branches(unet)
    channels = unet.config.in_dim
    norm, conv_out = cast(nn.GroupNorm, unet.out[0]), cast(nn.Conv2d, unet.out[2])
    conv_in = cast(nn.Conv2d, cast(nn.ModuleList, unet.input_blocks[0])[0])
    block = cast(ResidualBlock, cast(nn.ModuleList, unet.output_blocks[-1])[0])
    shortcut = cast(nn.Conv2d, block.skip_connection)
    _clear(conv_out)
    _identity(conv_in, channels)
    conv_in.weight[:channels] *= first
    shortcut.weight[:channels] = 0
    _bias(shortcut)[:channels] = 0
    skipped = shortcut.in_channels - shortcut.out_channels  # the skip's channels come after the block's own
    for channel in range(channels):
        shortcut.weight[channel, skipped + channel] = 1
    widened = _linear_end(norm, shortcut, block.temopral_conv.conv4[-1], channels)
    conv_out.weight[:, :, 1, 1] = widened(last * torch.eye(channels))


def _clear(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def start_clip(architecture: Mapping[str, Any]) -> open_clip.CLIP:
    """A CLIP of an open_clip model configuration with open_clip's own initial values."""
    known = {name: architecture[name] for name in ("embed_dim", "vision_cfg", "text_cfg")}
    return open_clip.CLIP(**known)


@torch.no_grad()
def start_as_resampling(autoencoder: Autoencoder, images: Tensor, detail: float = 0.5) -> None:
    """Set an autoencoder to average pooling and bilinear interpolation, from which it learns the rest.

    Pooling is what its strided convolutions can do, and interpolation its upsamplings (nearest, then the
    kernel 1 2 1). Colours pass the last norms unchanged beside large constant channels, whose share in the
    statistics of a group outweighs theirs. The first three latents are
    colours, white over ``images``; the others, with standard deviations of ``detail``, are the leading
    principal components of the differences that pooling loses.

    Args:
        autoencoder: of three colours; its first width must hold 12 channels, and a group 8.
        images: [N, 3, H, W] in [-1, 1], of the kind to be encoded.
        detail: standard deviation of all latents but the first three, as multiples of the diffusion's unit.
    """
    silence_branches(autoencoder)
    _start_encoder(autoencoder, images, detail)
    _start_decoder(autoencoder)


def _bias(conv: nn.Module) -> Tensor:
    if not isinstance(conv.bias, Tensor):
        raise ValueError(f"each convolution must have a bias, got {conv}")
    return conv.bias


def _end_blocks(level: nn.Module) -> tuple[nn.Conv2d, parts.ResidualBlock]:
    """Return the shortcut of a level's first block, which must change the width, and the last block."""
    blocks = [module for module in level.modules() if isinstance(module, parts.ResidualBlock)]
    shortcut = blocks[0].nin_shortcut
    if not isinstance(shortcut, nn.Conv2d):
        raise ValueError("the last two entries of ch_mult, and the first two, must differ")
    return shortcut, blocks[-1]


def _identity(conv: nn.Conv2d, channels: int) -> None:
    """Pass the first channels through, whatever the kernel's size, and mix nothing else into them."""
    centre = conv.kernel_size[0] // 2
    conv.weight[:channels] = 0
    _bias(conv)[:channels] = 0
    for channel in range(channels):
        conv.weight[channel, channel, centre, centre] = 1


def _linear_end(
    norm: nn.GroupNorm, shortcut: nn.Conv2d, last: nn.Module, count: int
) -> Callable[[Tensor], Tensor]:
    """Make features pass norm and SiLU unchanged, as silu(x) - silu(-x) = x.

    The first group of channels becomes the features, their negatives, and two constants, one negative: its
    mean is 0 for every image, and its deviation the constants'.

    Args:
        norm: the last norm.
        shortcut: the convolution that puts the ``count`` features into the first channels.
        last: the last layer of the last branch before the norm, which adds the constants.
        count: how many features there are; at most (channels of a group) / 2 - 1.

    Returns:
        A function that makes weights for the features [out, count, 1, 1] ones for the norm's channels.
    """
    size = norm.num_channels // norm.num_groups
    shortcut.weight[count : 2 * count] = -shortcut.weight[:count]
    bias = _bias(shortcut)
    bias[count : 2 * count] = -bias[:count]
    shortcut.weight[2 * count : size] = 0
    bias[2 * count : size] = 0
    _bias(last)[size - 2 : size] = torch.tensor([_REFERENCE, -_REFERENCE])
    norm.weight[:size] = _REFERENCE * math.sqrt(2 / size)
    norm.weight[size - 2 : size] = 0
    rest = norm.num_channels - 2 * count
    return lambda weight: torch.cat([weight, -weight, weight.new_zeros(len(weight), rest)], dim=1)


def _start_encoder(autoencoder: Autoencoder, images: Tensor, detail: float) -> None:
    encoder, latents = autoencoder.encoder, autoencoder.config.embed_dim
    most = encoder.norm_out.num_channels // encoder.norm_out.num_groups // 2 - 1
    kept = 3
    _identity(encoder.conv_in, 3)
    for module in encoder.down.modules():  # from the images down
        if isinstance(module, parts.ResidualBlock) and isinstance(module.nin_shortcut, nn.Conv2d):
            _identity(module.nin_shortcut, kept)
        elif isinstance(module, parts.Downsample):
            kept = _pool(module.conv, kept, most)
    shortcut, _ = _end_blocks(encoder.down[-1])
    widened = _linear_end(encoder.norm_out, shortcut, encoder.mid.block_2.conv2, kept)

    samples = []
    hook = shortcut.register_forward_hook(lambda _, __, output: samples.append(output[:, :kept]))
    encoder(images)
    hook.remove()
    features = samples[0].transpose(0, 1).flatten(1)
    whitening = _whitening(features[:3], 3), detail * _whitening(features[3:], latents - 3)
    projection = torch.block_diag(*whitening) / SCALE_FACTOR
    conv, quant = encoder.conv_out, autoencoder.quant_conv
    _clear(conv)
    conv.weight[:latents, :, 1, 1] = widened(projection)
    _bias(conv)[:latents] = -projection @ features.mean(1)
    _identity(quant, 2 * latents)
    _bias(quant)[latents:] = -6.0 - 2 * math.log(SCALE_FACTOR)  # the log-variance


def _pool(conv: nn.Conv2d, channels: int, most: int) -> int:
    """Make a strided convolution average 2x2 pixels, and keep differences of the first three channels.

    Returns how many channels it fills: at most ``most``.
    """
    _clear(conv)
    average = torch.full((2, 2), 0.25)
    down, across = torch.tensor([[1, 1], [-1, -1]]) / 4, torch.tensor([[1, -1], [1, -1]]) / 4
    for channel in range(channels):
        conv.weight[channel, channel, :2, :2] = average
    filled = channels
    for difference in (down, across, 4 * down * across):
        for colour in range(3):
            if filled < min(most, conv.out_channels):
                conv.weight[filled, colour, :2, :2] = difference
                filled += 1
    return filled


def _whitening(samples: Tensor, count: int) -> Tensor:
    """[count, C] of samples [C, N]: their leading principal components, of unit variance."""
    values, vectors = torch.linalg.eigh(torch.cov(samples))
    return (vectors / values.clamp_min(1e-8).sqrt()).T.flip(0)[:count]


def _start_decoder(autoencoder: Autoencoder) -> None:
    decoder, latents = autoencoder.decoder, autoencoder.config.embed_dim
    _identity(autoencoder.post_quant_conv, latents)
    autoencoder.post_quant_conv.weight *= SCALE_FACTOR
    # Back to colours: the inverse of what the encoder's end does to them.
    forward = autoencoder.encoder.conv_out
    inverse = torch.linalg.inv(forward.weight[:3, :3, 1, 1] * SCALE_FACTOR)
    _identity(decoder.conv_in, latents)
    decoder.conv_in.weight[:3] = 0
    decoder.conv_in.weight[:3, :3, 1, 1] = inverse
    decoder.conv_in.bias[:3] = -inverse @ _bias(forward)[:3] * SCALE_FACTOR
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    for module in decoder.up.modules():
        if isinstance(module, parts.ResidualBlock) and isinstance(module.nin_shortcut, nn.Conv2d):
            _identity(module.nin_shortcut, min(latents, module.nin_shortcut.out_channels))
        elif isinstance(module, parts.Upsample):
            conv = module.conv
            conv.weight[:latents], conv.bias[:latents] = 0, 0
            for channel in range(latents):
                conv.weight[channel, channel] = torch.outer(kernel, kernel)
    shortcut, block = _end_blocks(decoder.up[0])
    widened = _linear_end(decoder.norm_out, shortcut, block.conv2, 3)
    decoder.conv_out.weight[:] = 0
    decoder.conv_out.weight[:, :, 1, 1] = widened(torch.eye(3))
    _bias(decoder.conv_out)[:] = 0
