"""Stable Diffusion's KL autoencoder, frame by frame (https://arxiv.org/abs/2112.10752).

Inside, frames are n c h w in channels-last memory, as in the UNet.

Module names are the published checkpoint's, without its ``first_stage_model.``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import InvalidInputError
from .attention import sdpa_attention
from .config import AutoencoderConfig
from .layers import GroupNorm, GroupNormSiLU, StreamConv, stream_dtype

_EPS = 1e-6  # of every GroupNorm

#: Latents are kept at this multiple of the autoencoder's own (so that their variance is about 1).
SCALE_FACTOR = 0.18215


@dataclass(frozen=True)
class DiagonalGaussian:
    """The posterior of an encoding: independent normals, ``mean`` and ``logvar`` [N, z, h, w]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """mean + std noise; without ``noise`` [N, z, h, w] it is drawn from ``generator``."""
        if noise is None:
            device = generator.device if generator is not None else self.mean.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def mode(self) -> Tensor:
        """The most likely latent, which is the mean."""
        return self.mean


def posterior_of(moments: Tensor) -> DiagonalGaussian:
    """Return the posterior that an encoder's moments [N, 2 z, h, w] say."""
    mean, logvar = moments.chunk(2, dim=1)
    return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))


class ResidualBlock(nn.Module):
    nin_shortcut: StreamConv | nn.Identity

    def __init__(self, in_width: int, out_width: int, num_groups: int = 32):
        super().__init__()
        self.norm1 = GroupNormSiLU(in_width, _EPS, num_groups)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.norm2 = GroupNormSiLU(out_width, _EPS, num_groups)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        if in_width != out_width:
            self.nin_shortcut = StreamConv(in_width, out_width, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over the positions of each frame, n c h w."""

    def __init__(self, width: int, num_groups: int = 32):
        super().__init__()
        self.norm = GroupNorm(width, _EPS, num_groups)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(project(h), "n c h w -> n (h w) 1 c") for project in (self.q, self.k, self.v))
        h = rearrange(sdpa_attention(q, k, v), "n (h w) 1 c -> n c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = StreamConv(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # a row below and a column to the right


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = StreamConv(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MiddleBlock(nn.Module):
    def __init__(self, width: int, num_groups: int):
        super().__init__()
        self.block_1 = ResidualBlock(width, width, num_groups)
        self.attn_1 = AttentionBlock(width, num_groups)
        self.block_2 = ResidualBlock(width, width, num_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, then the down- or upsampling that the network attaches."""

    def __init__(self, in_width: int, out_width: int, blocks: int, num_groups: int):
        super().__init__()
        widths = [in_width] + [out_width] * blocks
        self.block = nn.ModuleList([ResidualBlock(a, b, num_groups) for a, b in zip(widths, widths[1:])])
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.block, self.downsample, self.upsample):
            if layer is not None:
                x = layer(x)
        return x


class Encoder(nn.Module):
    """Images [N, 3, H, W] to the posterior's moments [N, 2 z, H/8, W/8]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.ch * multiple for multiple in config.ch_mult]
        self.conv_in = StreamConv(config.in_channels, config.ch, 3, padding=1)
        levels = [
            Level(in_width, out_width, config.num_res_blocks, config.num_groups)
            for in_width, out_width in zip([config.ch] + widths, widths)
        ]
        for level, width in zip(levels[:-1], widths):
            level.downsample = Downsample(width)
        self.down = nn.ModuleList(levels)
        self.mid = MiddleBlock(widths[-1], config.num_groups)
        self.norm_out = GroupNormSiLU(widths[-1], _EPS, config.num_groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(self.norm_out(h))


class Decoder(nn.Module):
    """Latents [N, z, h, w] to images [N, 3, 8 h, 8 w]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.ch * multiple for multiple in config.ch_mult]
        self.conv_in = StreamConv(config.z_channels, widths[-1], 3, padding=1)
        self.mid = MiddleBlock(widths[-1], config.num_groups)
        levels = [
            Level(in_width, out_width, config.num_res_blocks + 1, config.num_groups)
            for in_width, out_width in zip(widths[1:] + widths[-1:], widths)
        ]
        for level, width in zip(levels[1:], widths[1:]):
            level.upsample = Upsample(width)
        self.up = nn.ModuleList(levels)  # numbered from the finest level, run from the coarsest
        self.norm_out = GroupNormSiLU(widths[0], _EPS, config.num_groups)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(self.norm_out(h))


class Autoencoder(nn.Module):
    """The KL autoencoder. Latents here are its own: see ``SCALE_FACTOR`` for the diffusion's."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type, and so that of what is computed."""
        return self.decoder.norm_out.weight.dtype  # a norm's, which no adapter replaces

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """The posterior of images [N, 3, H, W] in [-1, 1], H and W multiples of 8."""
        multiple, channels = self.config.downscale, self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % multiple or x.shape[3] % multiple:
            raise InvalidInputError(
                f"autoencoder: images must be [N, {channels}, H, W] with H and W multiples of {multiple}, "
                f"got {list(x.shape)}"
            )
        x = x.to(stream_dtype(self.dtype), memory_format=torch.channels_last)
        return posterior_of(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Images [N, 3, 8 h, 8 w], about [-1, 1], of latents [N, z, h, w]."""
        z = self.post_quant_conv(z.to(self.dtype, memory_format=torch.channels_last))
        return self.decoder(z.to(stream_dtype(self.dtype)))
