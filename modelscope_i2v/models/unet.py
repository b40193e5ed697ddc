"""The spatio-temporal UNet of I2VGen-XL, one network for both stages (https://arxiv.org/abs/2311.04145).

Inside, a video is (b f) c h w in channels-last memory: spatial layers see a batch of frames, temporal layers
unfold f, and both are views. Every layer is called as ``layer(x, conditioning)`` and takes from the
conditioning what it needs. Module names are the published checkpoints' parameter names, spelling included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import ConfigurationError, InvalidInputError
from .attention import AttentionFunction, sdpa_attention
from .conditioning import Conditioning, Context
from .layers import GroupNormSiLU, StreamConv, TemporalConv, stream_dtype
from .transformers import SpatialTransformer, TemporalTransformer


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
    num_groups: int = 32

    def __post_init__(self):
        if not self.image_conditioned and self.y_dim != self.context_dim:
            raise ConfigurationError(
                f"UNet: y_dim {self.y_dim} and context_dim {self.context_dim} must be equal in stage two"
            )
        if self.dim % 2:
            raise ConfigurationError(f"UNet: dim must be even, got {self.dim}")
        for level, multiple in enumerate(self.dim_mult):
            width = self.dim * multiple
            if width % self.num_groups:
                raise ConfigurationError(
                    f"UNet: dim x dim_mult[{level}] is {width}, and must be a multiple of "
                    f"num_groups {self.num_groups}"
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


class LayerList(nn.ModuleList):
    """Layers in sequence, all called alike; keeps the checkpoints' ``input_blocks.N.M`` names."""

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        for layer in self:
            x = layer(x, conditioning)
        return x


class FirstBlock(nn.ModuleList):
    """A convolution of the latent, and a transformer over its frames. (b f) c h w in and out."""

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        conv, transformer = self
        return transformer(conv(x), conditioning)


class Downsample(nn.Module):
    """Halves height and width, (b f) c h w."""

    def __init__(self, width: int, row_padding: int):
        super().__init__()
        self.op = StreamConv(width, width, 3, stride=2, padding=(row_padding, 1))

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width, (b f) c h w, and drops the rows that padding added on the way down."""

    def __init__(self, width: int, row_padding: int):
        super().__init__()
        self.surplus = row_padding - 1
        self.conv = StreamConv(width, width, 3, padding=1)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x[:, :, self.surplus : x.shape[2] - self.surplus])


class TemporalConvolution(nn.Module):
    """x + four of (GroupNorm, SiLU, convolution over 3 frames). (b f) c h w in and out."""

    def __init__(self, width: int, num_groups: int = 32):
        super().__init__()
        self.conv1 = self._layers(width, num_groups)
        # The others had a dropout between, which leaves a gap in their parameters' numbers.
        self.conv2 = self._layers(width, num_groups, nn.Identity())
        self.conv3 = self._layers(width, num_groups, nn.Identity())
        self.conv4 = self._layers(width, num_groups, nn.Identity())

    @staticmethod
    def _layers(width: int, num_groups: int, *gap: nn.Module) -> nn.Sequential:
        norm = GroupNormSiLU(width, num_groups=num_groups)
        return nn.Sequential(norm, nn.Identity(), *gap, TemporalConv(width))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        video = rearrange(x, "(b f) c h w -> b c f (h w)", f=frames)
        residual = self.conv4(self.conv3(self.conv2(self.conv1(video))))
        return x + rearrange(residual, "b c f (h w) -> (b f) c h w", h=x.shape[2])


class ResidualBlock(nn.Module):
    """Two convolutions a frame with the embedding between, then the temporal convolutions."""

    def __init__(self, in_width: int, embedding_dim: int, out_width: int, num_groups: int = 32):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNormSiLU(in_width, num_groups=num_groups),
            nn.Identity(),
            nn.Conv2d(in_width, out_width, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, out_width))
        self.out_layers = nn.Sequential(
            GroupNormSiLU(out_width, num_groups=num_groups),
            nn.Identity(),
            nn.Identity(),  # a dropout's place
            nn.Conv2d(out_width, out_width, 3, padding=1),
        )
        same = in_width == out_width
        self.skip_connection = nn.Identity() if same else StreamConv(in_width, out_width, 1)
        self.temopral_conv = TemporalConvolution(
            out_width, num_groups
        )  # spelt so in the published checkpoints

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        embedding = self.emb_layers(conditioning.embedding).to(x.dtype)
        embedding = embedding.repeat_interleave(conditioning.frames, 0)

        def spatial(frames: slice, _: slice) -> Tensor:
            h = self.in_layers(x[frames]) + embedding[frames, :, None, None]
            return self.skip_connection(x[frames]) + self.out_layers(h)

        return self.temopral_conv(conditioning.in_frame_groups(spatial, x), conditioning.frames)


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """[cos(t w), sin(t w)] with w_i = 10000^(-i / half): [B] -> [B, dim], float32."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclass
class _Shared:
    """Where all contexts' computations are the same yet: skips, the residual's output, the tokens of it."""

    skips: list[Tensor]
    x: Tensor | None
    tokens: Tensor | None

    def clear(self) -> None:
        """Let go of the memory."""
        self.skips, self.x, self.tokens = [], None, None


class UNet(nn.Module):
    """Predicts the velocity v of a noised video latent.

    Args:
        config: the architecture.
        attend: the attention function of all its attentions.

    Attributes:
        chunk: how many elements the largest tensor inside a layer may have, where the layer can take its
            input in parts; None for any number. It changes memory and time, not the result.
    """

    chunk: int | None = None

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
        self.input_blocks = nn.ModuleList([FirstBlock([first, mixing])])
        skips = [width]
        for level, level_width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(self._level_block(level, width, attend))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(Downsample(width, config.row_padding))
                skips.append(width)

        first, last = (self._residual_block(width, width) for _ in range(2))
        self.middle_block = LayerList([first, *self._transformers(width, attend), last])

        self.output_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.output_blocks.append(self._level_block(level, width + skips.pop(), attend))
                width = level_width
            if level > 0:
                self.output_blocks[-1].append(Upsample(width, config.row_padding))

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
        self._check(x, t, fps)
        self._check_conditioning(y, x.shape[0])
        return self.branches(x, t, [self.project_context(y)], fps)[0]

    def project_context(self, y: Tensor) -> Context:
        """Keys and values of a conditioning y, as of ``forward``: the same for all calls with that y."""
        self._check_conditioning(y, None)
        context = y.to(self.dtype)
        if self.config.image_conditioned:
            tokens = self.config.num_tokens
            context = rearrange(self.context_embedding(context), "b 1 (n c) -> b n c", n=tokens)
        transformers = [layer for layer in self.modules() if isinstance(layer, SpatialTransformer)]
        return {transformer: transformer.keys_values(context) for transformer in transformers}

    def branches(
        self,
        x: Tensor,
        t: Tensor,
        contexts: Sequence[Context],
        fps: Tensor | None = None,
        deep: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """The v-predictions for one noised latent under several contexts, as those of guidance.

        What comes before the first attention to a context is computed once for all of them.

        Args:
            x, t, fps: as of ``forward``.
            contexts: of ``project_context``, each of B samples. They are computed one after the other; one of
                k B samples, those of k contexts one after the other, is computed in one pass.
            deep: for reuse of features (https://arxiv.org/abs/2312.00858), which is an approximation. A list
                that is empty is filled with what all blocks but the outermost make, for each context. One
                that is filled stands for those blocks: only the outermost are computed.

        Returns:
            v [B, 4, F, h, w] for each context ([k B, ..] for one of k B samples), in the parameters' dtype.
        """
        self._check(x, t, fps)
        frames, height, width = x.shape[2:]
        x = self._frames_of(x)
        told = Conditioning(self._embed(t, fps), {}, frames, self.chunk)
        if deep:
            outermost = self.input_blocks[0](x, told)
            ends = [
                self._last_block(features, under.repeated(outermost), under)
                for features, under in zip(deep, map(told.under, contexts))
            ]
        else:
            shared = self._before_context(x, told)
            ends = []
            for number, context in enumerate(contexts, start=1):
                under = told.under(context)
                features, skip = self._after_context(shared, under, keep=number < len(contexts))
                ends.append(self._last_block(features, skip, under))
                if deep is not None:
                    deep.append(features)
        return [rearrange(end[:, :, :height, :width], "(b f) c h w -> b c f h w", f=frames) for end in ends]

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type, and so that of what is computed."""
        return self.out[0].weight.dtype  # a norm's, which no adapter replaces

    @property
    def _downward(self) -> list[nn.Module]:
        return [*self.input_blocks, self.middle_block]

    @property
    def _first_attending(self) -> int:
        """Which of these has the first spatial transformer, behind a residual block."""
        return next(
            number
            for number, block in enumerate(self._downward)
            if any(isinstance(layer, SpatialTransformer) for layer in block.children())
        )

    def _before_context(self, x: Tensor, told: Conditioning) -> _Shared:
        """Up to where the first spatial transformer attends to its context."""
        skips = []
        for block in self._downward[: self._first_attending]:
            x = block(x, told)
            skips.append(x)
        residual, spatial = self._downward[self._first_attending][:2]
        x = residual(x, told)
        return _Shared(skips, x, spatial.before_context(x, told))

    def _after_context(self, shared: _Shared, told: Conditioning, keep: bool) -> tuple[Tensor, Tensor]:
        """From there to before the last block: its two inputs. Without ``keep``, ``shared`` is used up."""
        first, *others = self._downward[self._first_attending :]
        _, spatial, *layers = first
        skips = [told.repeated(skip) for skip in shared.skips]
        x = spatial.after_context(told.repeated(shared.x), told.repeated(shared.tokens), told)
        if not keep:
            shared.clear()
        for layer in layers:
            x = layer(x, told)
        for block in others:
            skips.append(x)
            x = block(x, told)
        for block in self.output_blocks[:-1]:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in block:  # here, so that the wide input is let go once the first is done with it
                x = layer(x, told)
        return x, skips.pop()

    def _last_block(self, x: Tensor, skip: Tensor, told: Conditioning) -> Tensor:
        x = torch.cat([x, skip], dim=1)
        for layer in self.output_blocks[-1]:
            x = layer(x, told)
        return self.out(x)

    def _frames_of(self, x: Tensor) -> Tensor:
        """b c f h w -> the residual stream's (b f) c h w, of a size that comes back."""
        height, width = x.shape[3:]
        padded_height, padded_width = self.config.padded_size(height, width)
        x = rearrange(x.to(stream_dtype(self.dtype)), "b c f h w -> (b f) c h w")
        x = F.pad(x, (0, padded_width - width, 0, padded_height - height), mode="replicate")
        return x.contiguous(memory_format=torch.channels_last)

    def _embed(self, t: Tensor, fps: Tensor | None) -> Tensor:
        """The embedding of timestep and, in stage one, frame rate: [B, 4 dim]."""
        config = self.config
        embedding = self.time_embed(sinusoidal_embedding(t, config.dim).to(self.dtype))
        if not config.image_conditioned:
            return embedding
        fps = torch.full_like(t, config.default_fps) if fps is None else fps
        return embedding + self.fps_embedding(sinusoidal_embedding(fps, config.dim).to(self.dtype))

    def _check(self, x: Tensor, t: Tensor, fps: Tensor | None) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[1] != config.in_dim:
            raise InvalidInputError(f"UNet: x must be [B, {config.in_dim}, F, h, w], got {list(x.shape)}")
        for name, value in (("t", t), ("fps", fps)):
            if value is not None and value.shape != x.shape[:1]:
                raise InvalidInputError(f"UNet: {name} must be [{x.shape[0]}], got {list(value.shape)}")

    def _check_conditioning(self, y: Tensor, batch: int | None) -> None:
        one_token = self.config.image_conditioned
        fits = y.ndim == 3 and y.shape[2] == self.config.y_dim and batch in (None, y.shape[0])
        if not fits or (one_token and y.shape[1] != 1):
            needed = f"[{batch or 'B'}, {'1' if one_token else 'N'}, {self.config.y_dim}]"
            raise InvalidInputError(f"UNet: y must be {needed}, got {list(y.shape)}")
