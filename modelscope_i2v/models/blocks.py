"""The UNet's convolutional blocks: residual blocks with their convolutions over time, down- and upsampling.

Module names are the published checkpoints' parameter names.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .conditioning import Conditioning, in_frame_groups, repeat_to
from .layers import GroupNormSiLU, StreamConv, TemporalConv


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
        embedding = repeat_to(embedding.repeat_interleave(conditioning.frames, 0), len(x))

        def spatial(frames: slice, _: slice) -> Tensor:
            h = self.in_layers(x[frames]) + embedding[frames, :, None, None]
            return self.skip_connection(x[frames]) + self.out_layers(h)

        return self.temopral_conv(in_frame_groups(spatial, x, conditioning), conditioning.frames)
