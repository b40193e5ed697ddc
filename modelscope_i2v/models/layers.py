"""Layers that the networks share, written for one memory layout: channels last, from end to end.

In that layout the pixels of a frame, and the frames of a video, follow each other as rows of channels. So
frames can be folded into the batch, tokens made of pixels, and time made a spatial axis, all without a copy.

A network's blocks add to one residual stream from its first convolution to its last. In bfloat16, whose eight
bits each addition would round to, the stream is float32: norms take it and give the parameters' type to the
convolutions and linear maps behind them. In other types all is of the parameters' type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # of every GroupNorm


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the residual stream of a network whose parameters are of a type."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


class StreamConv(nn.Conv2d):
    """A convolution from the residual stream to the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of the residual stream, which gives the parameters' type."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of 32 groups, n c h w in and out, by whatever computes it best where x is.

    It gives the parameters' type.
    """

    silu = False

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__(GROUPS, width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self, self.silu)


class GroupNormSiLU(GroupNorm):
    """GroupNorm, then SiLU."""

    silu = True


def group_norm(x: Tensor, norm: nn.GroupNorm, silu: bool) -> Tensor:
    """A norm of x [N, C, h, w], then SiLU if wanted, in x's memory layout and the norm's type."""
    if x.is_cuda:
        from . import triton_group_norm as fused  # optional, and of no use elsewhere

        if fused.supports(x):
            return fused.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu)
    apart = _slow_in_channels_last(x, norm)
    y = x.contiguous() if apart else x
    y = F.group_norm(y, norm.num_groups, norm.weight.to(y.dtype), norm.bias.to(y.dtype), norm.eps)
    y = (F.silu(y, inplace=True) if silu else y).to(norm.weight.dtype)
    return y.contiguous(memory_format=torch.channels_last) if apart else y


def _slow_in_channels_last(x: Tensor, norm: nn.GroupNorm) -> bool:
    """Whether torch takes longer than with the channels apart, the copies there and back included.

    On a CPU its kernel for fewer than 1024 positions goes over the channels of one group at a time. In half
    precision they fill no vector register where they are few: up to eight times slower, as measured.
    """
    narrow = x.shape[1] < 32 * norm.num_groups
    small = x.shape[0] > 1 and x.shape[2] * x.shape[3] < 1024
    return x.device.type == "cpu" and x.element_size() == 2 and narrow and small


class TemporalConv(nn.Conv3d):
    """A convolution over 3 frames at each pixel: b c f p in and out, with the pixels of a frame as one axis.

    Its parameter is a three-dimensional convolution's [out, in, 3, 1, 1]. Computed as the two-dimensional
    one that it is, it takes channels-last memory as it comes.
    """

    def __init__(self, width: int):
        super().__init__(width, width, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.squeeze(-1), self.bias, padding=(1, 0))


def in_channels_last(weight: Tensor) -> Tensor:
    """A weight laid out as the activations are, so that no call reorders it, if it is a convolution's."""
    if weight.ndim == 4:
        return weight.contiguous(memory_format=torch.channels_last)
    if weight.ndim == 5:
        return weight.contiguous(memory_format=torch.channels_last_3d)
    return weight
