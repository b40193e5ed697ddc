"""The spatio-temporal UNet of I2VGen-XL, one network for both stages (https://arxiv.org/abs/2311.04145).

Inside, a video is (b f) c h w in channels-last memory: spatial layers see a batch of frames, temporal layers
unfold f, and both are views. Every layer is called as ``layer(x, conditioning)`` and takes from the
conditioning what it needs. Module names are the published checkpoints' parameter names, spelling included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import InvalidInputError
from .attention import AttentionFunction, sdpa_attention
from .blocks import Downsample, ResidualBlock, Upsample
from .conditioning import Conditioning, repeat_to
from .config import UNetConfig
from .layers import GroupNormSiLU, StreamConv, stream_dtype
from .transformers import SpatialTransformer, TemporalTransformer


class LayerList(nn.ModuleList):
    """Layers in sequence, all called alike; keeps the checkpoints' ``input_blocks.N.M`` names."""

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        for layer in self:
            x = layer(x, conditioning)
        return x


class InputBlock(nn.ModuleList):
    """A convolution of the latent, and a transformer over its frames. (b f) c h w in and out."""

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        conv, transformer = self
        return transformer(conv(x), conditioning)


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """[cos(t w), sin(t w)] with w_i = 10000^(-i / half): [B] -> [B, dim], float32."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclass
class FeatureCache:
    """Features that later calls use again (https://arxiv.org/abs/2312.00858), which is an approximation.

    A call with an empty cache leaves in it what all blocks but the outermost made. A call with a filled one
    computes the outermost blocks only.
    """

    features: Tensor | None = None


class UNet(nn.Module):
    """Predicts the velocity v of a noised video latent.

    Args:
        config: the architecture.
        attend: the attention function of all its attentions.
    """

    def __init__(self, config: UNetConfig, attend: AttentionFunction = sdpa_attention):
        super().__init__()
        self.config = config
        self.time_embed = self._embedding(config.dim, 4 * config.dim)
        if config.image_conditioned:
            self.context_embedding = self._embedding(
                config.y_dim, config.context_dim * config.num_tokens, hidden=4 * config.dim
            )
            self.fps_embedding = self._embedding(config.dim, 4 * config.dim)

        widths = [config.dim * multiple for multiple in config.dim_mult]
        width = config.dim
        first = StreamConv(config.in_dim, width, 3, padding=1)
        mixing = TemporalTransformer(width, config.num_heads, config.head_dim, attend, config.num_groups)
        self.input_blocks = nn.ModuleList([InputBlock([first, mixing])])
        skips = [width]
        for level, level_width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(self._level_block(level, width, attend))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(Downsample(width, config.row_padding))
                skips.append(width)

        before, after = (self._residual_block(width, width) for _ in range(2))
        self.middle_block = LayerList([before, *self._transformers(width, attend), after])

        self.output_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                block = self._level_block(level, width + skips.pop(), attend)
                self.output_blocks.append(block)
                width = level_width
            if level > 0:
                block.append(Upsample(width, config.row_padding))

        self.out = nn.Sequential(
            GroupNormSiLU(width, num_groups=config.num_groups),
            nn.Identity(),
            nn.Conv2d(width, config.out_dim, 3, padding=1),
        )

    def _residual_block(self, in_width: int, out_width: int) -> ResidualBlock:
        return ResidualBlock(in_width, 4 * self.config.dim, out_width, self.config.num_groups)

    def _transformers(self, width: int, attend: AttentionFunction) -> list[nn.Module]:
        config, heads = self.config, width // self.config.head_dim
        return [
            SpatialTransformer(width, heads, config.context_dim, attend, config.num_groups),
            TemporalTransformer(width, heads, config.head_dim, attend, config.num_groups),
        ]

    def _level_block(self, level: int, in_width: int, attend: AttentionFunction) -> LayerList:
        """A residual block to the level's width, and the transformers where the level has them."""
        config = self.config
        width = config.dim * config.dim_mult[level]
        block = LayerList([self._residual_block(in_width, width)])
        if 0.5**level in config.attn_scales:
            block.extend(self._transformers(width, attend))
        return block

    @staticmethod
    def _embedding(in_dim: int, out_dim: int, hidden: int | None = None) -> nn.Sequential:
        hidden = hidden or out_dim
        return nn.Sequential(nn.Linear(in_dim, hidden), nn.SiLU(), nn.Linear(hidden, out_dim))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        fps: Tensor | None = None,
        *,
        cache: FeatureCache | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Return the v-prediction for a noised latent, under one or several contexts for each sample.

        Sizes that down- and upsampling do not return to are padded, by repeating the edge, and cropped back.
        With k contexts, what comes before the first attention to a context is computed once for all.

        Args:
            x: noised latent [B, 4, F, h, w].
            t: timestep [B], in 0..999.
            y: stage one: image embedding [k B, 1, y_dim]; stage two: text hidden states
                [k B, N, context_dim]. All samples' first contexts come first.
            fps: stage one only: frames a second [B]; absent, the configuration's ``default_fps``.
            cache: features to use again, or to be filled; see there.
            chunk: how many elements the largest tensor inside a layer may have, where it can take its input
                in parts; None for any number. It changes memory and time, not the result.

        Returns:
            v [k B, 4, F, h, w], in the parameters' dtype.

        Raises:
            InvalidInputError: if a shape does not fit.
        """
        self._check(x, t, y, fps)
        frames, height, width = x.shape[2:]
        conditioning = Conditioning(self._embed(t, fps), self._embed_context(y), frames, chunk)
        h = self._to_stream(x)

        # Down, middle
        h = self.input_blocks[0](h, conditioning)
        skips = [h]
        output_blocks = self.output_blocks
        if cache is None or cache.features is None:
            for block in self.input_blocks[1:]:
                h = block(h, conditioning)
                skips.append(h)
            h = self.middle_block(h, conditioning)
        else:
            h, output_blocks = cache.features, output_blocks[-1:]

        # Up
        for block in output_blocks:
            if cache is not None and block is self.output_blocks[-1]:
                cache.features = h
            h = torch.cat([h, repeat_to(skips.pop(), len(h))], dim=1)
            for layer in (
                block.children()
            ):  # here, so that the wide input is let go once the first layer is done with it
                h = layer(h, conditioning)

        h = self.out(h)[:, :, :height, :width]
        return rearrange(h, "(b f) c h w -> b c f h w", f=frames)

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type, and so that of what is computed."""
        return next(self.out.parameters()).dtype  # a norm's, which no adapter replaces

    def _to_stream(self, x: Tensor) -> Tensor:
        """b c f h w -> the residual stream's (b f) c h w, padded to a size that comes back."""
        height, width = x.shape[3:]
        padded_height, padded_width = self.config.padded_size(height, width)
        x = rearrange(x.to(stream_dtype(self.dtype)), "b c f h w -> (b f) c h w")
        x = F.pad(x, (0, padded_width - width, 0, padded_height - height), mode="replicate")
        return x.contiguous(memory_format=torch.channels_last)

    def _embed(self, t: Tensor, fps: Tensor | None) -> Tensor:
        """Embed timestep and, in stage one, frame rate: [B, 4 dim]."""
        config = self.config
        embedding = self.time_embed(sinusoidal_embedding(t, config.dim).to(self.dtype))
        if not config.image_conditioned:
            return embedding
        fps = torch.full_like(t, config.default_fps) if fps is None else fps
        return embedding + self.fps_embedding(sinusoidal_embedding(fps, config.dim).to(self.dtype))

    def _embed_context(self, y: Tensor) -> Tensor:
        """Return what the spatial transformers attend to, [k B, M, context_dim]."""
        if not self.config.image_conditioned:
            return y.to(self.dtype)
        context = self.context_embedding(y.to(self.dtype))
        return rearrange(context, "b 1 (n c) -> b n c", n=self.config.num_tokens)

    def _check(self, x: Tensor, t: Tensor, y: Tensor, fps: Tensor | None) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[1] != config.in_dim:
            raise InvalidInputError(f"UNet: x must be [B, {config.in_dim}, F, h, w], got {list(x.shape)}")
        batch = x.shape[0]
        for name, value in (("t", t), ("fps", fps)):
            if value is not None and value.shape != x.shape[:1]:
                raise InvalidInputError(f"UNet: {name} must be [{batch}], got {list(value.shape)}")
        tokens = 1 if config.image_conditioned else "N"
        fits = y.ndim == 3 and len(y) and len(y) % batch == 0 and y.shape[2] == config.y_dim
        if not fits or y.shape[1] != tokens != "N":
            needed = f"[{batch}, {tokens}, {config.y_dim}]"
            raise InvalidInputError(f"UNet: y must be {needed}, got {list(y.shape)}")
