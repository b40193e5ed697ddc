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


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the residual stream's type in a network whose parameters have ``dtype``."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


class StreamConv(nn.Conv2d):
    """A convolution from the residual stream to the residual stream."""

    bias: Tensor  # always made

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of the residual stream, which gives the parameters' type."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class GroupNorm(nn.GroupNorm):
    """GroupNorm, n c h w in and out, in x's memory layout and the parameters' type.

    It is computed by whatever is the fastest where x is.
    """

    silu = False

    def __init__(self, width: int, eps: float = 1e-5, num_groups: int = 32):
        super().__init__(num_groups, width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            from . import triton_group_norm as fused  # optional, and of no use elsewhere

            if fused.supports(x):
                return fused.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)
        channels_first = _slow_in_channels_last(x, self.num_groups)
        y = x.contiguous() if channels_first else x
        y = F.group_norm(y, self.num_groups, self.weight.to(y.dtype), self.bias.to(y.dtype), self.eps)
        if self.silu:
            y = F.silu(y, inplace=not torch.is_grad_enabled())
        y = y.to(self.weight.dtype)
        return y.contiguous(memory_format=torch.channels_last) if channels_first else y


class GroupNormSiLU(GroupNorm):
    """GroupNorm, then SiLU."""

    silu = True


def _slow_in_channels_last(x: Tensor, num_groups: int) -> bool:
    """Whether torch takes longer than in channels-first memory, the copies there and back included.

    On a CPU its kernel for fewer than 1024 positions goes over the channels of one group at a time. In half
    precision they fill no vector register where they are few: up to eight times slower, as measured.
    """
    narrow = x.shape[1] < 32 * num_groups
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


class PointwiseConv(nn.Conv1d):
    """A convolution of width 1 over tokens [.., C]: computed as the linear map that it is, without copies."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__(in_width, out_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.squeeze(-1), self.bias)


def in_channels_last(weight: Tensor) -> Tensor:
    """A weight laid out as the activations are, so that no call reorders it, if it is a convolution's."""
    if weight.ndim == 4:
        return weight.contiguous(memory_format=torch.channels_last)
    if weight.ndim == 5:
        return weight.contiguous(memory_format=torch.channels_last_3d)
    return weight
