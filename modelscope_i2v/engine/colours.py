"""The source's colours in a generated video: its low frequencies in place of the generated ones.

As the wavelet colour correction of StableSR (https://arxiv.org/abs/2305.07015, its released code), whose low
band is a blur by a wavelet's levels: here its two coarsest, on a grid of means, so that the source's band of
a frame is small enough to keep until the frame is decoded. It is of whole frames, and knows no windows or
tiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Pixels a side of the grid's cells. Detail finer than a few cells stays the generated one.
CELL = 16


def low_frequencies(frames: Tensor) -> Tensor:
    """Return the low band of frames [N, 3, H, W], as a grid [N, 3, ceil(H / CELL), ceil(W / CELL)]."""
    size = [-(-side // CELL) for side in frames.shape[2:]]
    grid = F.interpolate(frames.float(), size=size, mode="area")
    kernel = torch.tensor([0.25, 0.5, 0.25], device=grid.device)
    for dilation in (1, 2):  # the wavelet's levels of CELL and 2 CELL
        for axis in (2, 3):
            grid = _blurred(grid, kernel, dilation, axis)
    return grid


def with_low_frequencies(frames: Tensor, grid: Tensor) -> Tensor:
    """Return frames [N, 3, H, W] with another low band, as ``low_frequencies`` gives it."""
    difference = grid.to(frames.device) - low_frequencies(frames)
    size = [CELL * side for side in difference.shape[2:]]
    spread = F.interpolate(difference, size=size, mode="bilinear")
    return frames + spread[:, :, : frames.shape[2], : frames.shape[3]].to(frames.dtype)


def _blurred(grid: Tensor, kernel: Tensor, dilation: int, axis: int) -> Tensor:
    last = grid.shape[axis] - 1
    places = torch.arange(last + 1, device=grid.device)
    taps = ((places + offset * dilation).clamp(0, last) for offset in (-1, 0, 1))
    return sum(weight * grid.index_select(axis, tap) for weight, tap in zip(kernel, taps))  # type: ignore[return-value]
