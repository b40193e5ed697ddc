"""Layers that the networks share, written for one memory layout: channels last, from end to end.

In that layout the pixels of a frame, and the frames of a video, follow each other as rows of channels. So
frames can be folded into the batch, tokens made of pixels, and time made a spatial axis, all without a copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # of every GroupNorm


class GroupNormSiLU(nn.GroupNorm):
    """GroupNorm, then SiLU, n c h w in and out."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__(GROUPS, width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x), inplace=True)


class TemporalConv(nn.Conv3d):
    """A convolution over 3 frames at each pixel: b c f p in and out, with the pixels of a frame as one axis.

    Its parameter is a three-dimensional convolution's [out, in, 3, 1, 1]. Computed as the two-dimensional
    one that it is, it takes channels-last memory as it comes.
    """

    def __init__(self, width: int):
        super().__init__(width, width, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.squeeze(-1), self.bias, padding=(1, 0))


def channels_last(network: nn.Module) -> nn.Module:
    """Lays out a network's convolutions as its activations are, so that no call reorders them."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        elif parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return network
