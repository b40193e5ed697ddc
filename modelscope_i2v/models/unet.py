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

from ..errors import ConfigurationError, InvalidInputError
from .attention import AttentionFunction, sdpa_attention
from .layers import GROUPS, GroupNormSiLU, TemporalConv


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of the UNet; the defaults are the published one's.

    ``image_conditioned`` is stage one: an image embedding becomes ``num_tokens`` context tokens, and the
    frame rate is embedded beside the timestep. Otherwise the context is used as it comes (stage two).
    ``row_padding`` is the zero padding, in rows, of the strided convolutions: stage two was trained
    with 2, and each of its upsamplings takes the surplus row off again at either edge.
    """

    image_conditioned: bool = True
    row_padding: int = 1
    in_dim: int = 4
    dim: int = 320
    y_dim: int = 1024
    context_dim: int = 1024
    out_dim: int = 4
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_heads: int = 8
    head_dim: int = 64
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = (1.0, 0.5, 0.25)
    num_tokens: int = 4
    default_fps: int = 8

    def __post_init__(self):
        if not self.image_conditioned and self.y_dim != self.context_dim:
            raise ConfigurationError(
                f"UNet: y_dim {self.y_dim} and context_dim {self.context_dim} must be equal in stage two"
            )
        if self.dim % 2:
            raise ConfigurationError(f"UNet: dim must be even, got {self.dim}")
        for level, multiple in enumerate(self.dim_mult):
            width = self.dim * multiple
            if width % GROUPS:
                raise ConfigurationError(
                    f"UNet: dim x dim_mult[{level}] is {width}, and must be a multiple of {GROUPS}"
                )
            attends = 0.5**level in self.attn_scales or level == len(self.dim_mult) - 1  # as the middle does
            if attends and width % self.head_dim:
                raise ConfigurationError(
                    f"UNet: dim x dim_mult[{level}] is {width}, and must be a multiple of "
                    f"head_dim {self.head_dim}"
                )

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The smallest latent size from (height, width) up whose skips meet after down- and upsampling."""
        multiple = 2 ** (len(self.dim_mult) - 1)
        surplus = 2 * (self.row_padding - 1)
        rows = math.ceil(max(height - surplus, 0) / multiple) * multiple + surplus
        return max(rows, surplus or multiple), math.ceil(width / multiple) * multiple


@dataclass(frozen=True)
class Conditioning:
    """What the layers are told besides their input: one per call, shared by all."""

    embedding: Tensor  # of timestep (and frame rate) [B, 4 dim]
    context: Tensor  # tokens for cross-attention [B, N, context_dim]
    frames: int


class LayerList(nn.ModuleList):
    """Layers in sequence, all called alike; keeps the checkpoints' ``input_blocks.N.M`` names."""

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        for layer in self:
            x = layer(x, conditioning)
        return x


class InputConv(nn.Conv2d):
    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        return super().forward(x)


class Downsample(nn.Module):
    """Halves height and width, (b f) c h w."""

    def __init__(self, width: int, row_padding: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=(row_padding, 1))

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width, (b f) c h w, and drops the rows that padding added on the way down."""

    def __init__(self, width: int, row_padding: int):
        super().__init__()
        self.surplus = row_padding - 1
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x[:, :, self.surplus : x.shape[2] - self.surplus])


class TemporalConvolution(nn.Module):
    """x + four of (GroupNorm, SiLU, convolution over 3 frames). (b f) c h w in and out."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = self._layers(width)
        # The others had a dropout between, which leaves a gap in their parameters' numbers.
        self.conv2 = self._layers(width, nn.Identity())
        self.conv3 = self._layers(width, nn.Identity())
        self.conv4 = self._layers(width, nn.Identity())

    @staticmethod
    def _layers(width: int, *gap: nn.Module) -> nn.Sequential:
        return nn.Sequential(GroupNormSiLU(width), nn.Identity(), *gap, TemporalConv(width))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        video = rearrange(x, "(b f) c h w -> b c f (h w)", f=frames)
        residual = self.conv4(self.conv3(self.conv2(self.conv1(video))))
        return x + rearrange(residual, "b c f (h w) -> (b f) c h w", h=x.shape[2])


class ResidualBlock(nn.Module):
    """Two convolutions a frame with the embedding between, then the temporal convolutions."""

    def __init__(self, in_width: int, embedding_dim: int, out_width: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNormSiLU(in_width), nn.Identity(), nn.Conv2d(in_width, out_width, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, out_width))
        self.out_layers = nn.Sequential(
            GroupNormSiLU(out_width),
            nn.Identity(),
            nn.Identity(),  # a dropout's place
            nn.Conv2d(out_width, out_width, 3, padding=1),
        )
        same = in_width == out_width
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_width, out_width, 1)
        self.temopral_conv = TemporalConvolution(out_width)  # spelt so in the published checkpoints

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        embedding = self.emb_layers(conditioning.embedding).repeat_interleave(conditioning.frames, 0)
        h = self.in_layers(x) + embedding[:, :, None, None]
        h = self.skip_connection(x) + self.out_layers(h)
        return self.temopral_conv(h, conditioning.frames)


class Attention(nn.Module):
    """Multi-head attention from tokens [B, N, width] to context [B, M, context_dim]."""

    def __init__(self, width: int, context_dim: int, heads: int, attend: AttentionFunction):
        super().__init__()
        self.heads = heads
        self.attend = attend
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            rearrange(projected, "b n (heads d) -> b n heads d", heads=self.heads)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(rearrange(self.attend(q, k, v), "b n heads d -> b n (heads d)"))


class GEGLU(nn.Module):
    """Gated linear unit with the exact GELU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.proj = nn.Linear(in_width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(width, 4 * width),
            nn.Identity(),  # a dropout's place
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context (to itself where there is none), feed-forward."""

    def __init__(self, width: int, heads: int, attend: AttentionFunction, context_dim: int | None = None):
        super().__init__()
        self.attn1 = Attention(width, width, heads, attend)
        self.ff = FeedForward(width)
        self.attn2 = Attention(width, context_dim or width, heads, attend)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        normed = self.norm2(x)
        if context is None:
            x = x + self.attn2(normed, normed)
        else:
            # One context serves all frames of a video: (b f) n c -> b (f n) c puts their tokens side by side.
            queries = normed.reshape(context.shape[0], -1, normed.shape[-1])
            x = x + self.attn2(queries, context).view_as(x)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer over the pixels of each frame, attending to the context. (b f) c h w in and out."""

    def __init__(self, width: int, heads: int, context_dim: int, attend: AttentionFunction):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, attend, context_dim)])
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        tokens = self.proj_in(rearrange(self.norm(x), "bf c h w -> bf (h w) c"))
        for block in self.transformer_blocks:
            tokens = block(tokens, conditioning.context)
        return x + rearrange(self.proj_out(tokens), "bf (h w) c -> bf c h w", h=x.shape[2])


class TemporalTransformer(nn.Module):
    """A transformer over the frames of each pixel. (b f) c h w in and out."""

    def __init__(self, width: int, heads: int, head_dim: int, attend: AttentionFunction):
        super().__init__()
        inner = heads * head_dim
        # Its GroupNorm, like those of the temporal convolutions, takes its statistics over f, h and w.
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in = nn.Conv1d(width, inner, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, heads, attend)])
        self.proj_out = nn.Conv1d(inner, width, 1)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        frames, height = conditioning.frames, x.shape[2]
        video = self.norm(rearrange(x, "(b f) c h w -> b c f (h w)", f=frames))
        tokens = rearrange(video, "b c f p -> (b p) f c")
        # A convolution of width 1 is a linear map: applied as one, it needs no transposed copies.
        tokens = F.linear(tokens, self.proj_in.weight.squeeze(-1), self.proj_in.bias)
        for block in self.transformer_blocks:
            tokens = block(tokens)
        tokens = F.linear(tokens, self.proj_out.weight.squeeze(-1), self.proj_out.bias)
        return x + rearrange(tokens, "(b h w) f c -> (b f) c h w", h=height, w=x.shape[3])


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """[cos(t w), sin(t w)] with w_i = 10000^(-i / half): [B] -> [B, dim], float32."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


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
        first = InputConv(config.in_dim, width, 3, padding=1)
        mixing = TemporalTransformer(width, config.num_heads, config.head_dim, attend)
        self.input_blocks = nn.ModuleList([LayerList([first, mixing])])
        skips = [width]
        for level, level_width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(self._level_block(level, width, attend))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(Downsample(width, config.row_padding))
                skips.append(width)

        first, last = (ResidualBlock(width, 4 * config.dim, width) for _ in range(2))
        self.middle_block = LayerList([first, *self._transformers(width, attend), last])

        self.output_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.output_blocks.append(self._level_block(level, width + skips.pop(), attend))
                width = level_width
            if level > 0:
                self.output_blocks[-1].append(Upsample(width, config.row_padding))

        self.out = nn.Sequential(
            GroupNormSiLU(width), nn.Identity(), nn.Conv2d(width, config.out_dim, 3, padding=1)
        )

    def _transformers(self, width: int, attend: AttentionFunction) -> list[nn.Module]:
        config, heads = self.config, width // self.config.head_dim
        return [
            SpatialTransformer(width, heads, config.context_dim, attend),
            TemporalTransformer(width, heads, config.head_dim, attend),
        ]

    def _level_block(self, level: int, in_width: int, attend: AttentionFunction) -> LayerList:
        """A residual block to the level's width, and the transformers where the level has them."""
        config = self.config
        width = config.dim * config.dim_mult[level]
        block = LayerList([ResidualBlock(in_width, 4 * config.dim, width)])
        if 0.5**level in config.attn_scales:
            block.extend(self._transformers(width, attend))
        return block

    @staticmethod
    def _embedding(in_dim: int, out_dim: int, hidden: int | None = None) -> nn.Sequential:
        hidden = hidden or out_dim
        return nn.Sequential(nn.Linear(in_dim, hidden), nn.SiLU(), nn.Linear(hidden, out_dim))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, fps: Tensor | None = None) -> Tensor:
        """The v-prediction for a noised latent.

        Sizes that down- and upsampling do not return to are padded, by repeating the edge, and cropped back.

        Args:
            x: noised latent [B, 4, F, h, w].
            t: timestep [B], in 0..999.
            y: stage one: image embedding [B, 1, y_dim]; stage two: text hidden states [B, N, context_dim].
            fps: stage one only: frames a second [B]; absent, the configuration's ``default_fps``.

        Returns:
            v [B, 4, F, h, w], in the parameters' dtype.

        Raises:
            InvalidInputError: if a shape does not fit.
        """
        self._check(x, t, y, fps)
        frames, height, width = x.shape[2:]
        padded_height, padded_width = self.config.padded_size(height, width)
        conditioning = self._condition(t, y, fps, frames)
        x = rearrange(x.to(self.out[2].weight.dtype), "b c f h w -> (b f) c h w")
        x = F.pad(x, (0, padded_width - width, 0, padded_height - height), mode="replicate")
        x = x.contiguous(memory_format=torch.channels_last)

        skips = []
        for block in self.input_blocks:
            x = block(x, conditioning)
            skips.append(x)
        x = self.middle_block(x, conditioning)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), conditioning)

        x = self.out(x)[:, :, :height, :width]
        return rearrange(x, "(b f) c h w -> b c f h w", f=frames)

    def _condition(self, t: Tensor, y: Tensor, fps: Tensor | None, frames: int) -> Conditioning:
        config, dtype = self.config, self.out[2].weight.dtype
        embedding = self.time_embed(sinusoidal_embedding(t, config.dim).to(dtype))
        context = y.to(dtype)
        if config.image_conditioned:
            if fps is None:
                fps = torch.full_like(t, config.default_fps)
            embedding = embedding + self.fps_embedding(sinusoidal_embedding(fps, config.dim).to(dtype))
            context = self.context_embedding(context)
            context = rearrange(context, "b 1 (n c) -> b n c", n=config.num_tokens)
        return Conditioning(embedding, context, frames)

    def _check(self, x: Tensor, t: Tensor, y: Tensor, fps: Tensor | None) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[1] != config.in_dim:
            raise InvalidInputError(f"UNet: x must be [B, {config.in_dim}, F, h, w], got {list(x.shape)}")
        for name, value in (("t", t), ("fps", fps)):
            if value is not None and value.shape != x.shape[:1]:
                raise InvalidInputError(f"UNet: {name} must be [{x.shape[0]}], got {list(value.shape)}")
        tokens = "1" if config.image_conditioned else "N"
        fits = y.ndim == 3 and y.shape[0] == x.shape[0] and y.shape[2] == config.y_dim
        if not fits or (config.image_conditioned and y.shape[1] != 1):
            raise InvalidInputError(
                f"UNet: y must be [{x.shape[0]}, {tokens}, {config.y_dim}], got {list(y.shape)}"
            )
