"""Long videos in overlapping windows of frames, and large frames in overlapping tiles."""

from __future__ import annotations

from typing import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .schedules import NoiseLevel, Velocity

#: Where a part of a video begins: its first frame, row and column.
Origin = tuple[int, int, int]
#: (a window of x [B, C, f, h, w], level, its first frame) -> v [.., B, C, f, h, w]
WindowVelocity = Callable[[Tensor, NoiseLevel, int], Tensor]
#: The same of a tile of a window.
TileVelocity = Callable[[Tensor, NoiseLevel, Origin], Tensor]
#: Computes the parts that begin at some places, by a function of the place, in order.
Parts = Callable[[Callable[[int], Tensor], Sequence[int]], Iterable[Tensor]]


def window_starts(frames: int, size: int, overlap: int) -> list[int]:
    """Return the starts of windows of ``size`` frames that cover ``frames``, ``overlap`` or more in common.

    The last window is moved back to end with the video, so that all are of full size.
    """
    if frames <= size:
        return [0]
    return [*range(0, frames - size, size - overlap), frames - size]


def windowed(velocity: WindowVelocity, size: int, overlap: int, parts: Parts = map) -> Velocity:
    """Predict long videos in overlapping windows of ``size`` frames, blended where they overlap.

    Every step blends the windows' predictions, weighted down towards each window's ends (as
    https://arxiv.org/abs/2302.08113 does in space), so all frames are denoised together, without seams.
    """

    def blended(x: Tensor, level: NoiseLevel) -> Tensor:
        if x.shape[2] <= size:
            return velocity(x, level, 0)

        def part(start: int) -> Tensor:
            return velocity(x[:, :, start : start + size], level, start)

        return _blended(part, x.shape[2], size, overlap, -3, parts)

    return blended


def tiled(velocity: TileVelocity, size: tuple[int, int], overlap: tuple[int, int]) -> WindowVelocity:
    """Predict large frames in overlapping tiles of ``size`` (rows, columns), blended as windows are.

    Rows of tiles are blended first, and then with each other: the weights of both axes are multiplied.
    """
    (height, width), (over_rows, over_columns) = size, overlap

    def blended(x: Tensor, level: NoiseLevel, start: int) -> Tensor:
        def row(y: int) -> Tensor:
            def tile(z: int) -> Tensor:
                part = x[..., y : y + height, z : z + width]
                return velocity(part, level, (start, y, z))

            return _blended(tile, x.shape[4], width, over_columns, -1)

        return _blended(row, x.shape[3], height, over_rows, -2)

    return blended


def _blended(
    part: Callable[[int], Tensor], length: int, size: int, overlap: int, axis: int, parts: Parts = map
) -> Tensor:
    """Return the weighted mean of overlapping parts along an axis, counted from the last."""
    if length <= size:
        return part(0)
    starts = window_starts(length, size, overlap)
    for start, v in zip(starts, parts(part, starts)):
        if start == 0:
            shape, broadcast = list(v.shape), [-1] + [1] * (-1 - axis)
            shape[axis] = length
            ramp = torch.arange(1, size + 1, device=v.device, dtype=v.dtype)
            weight = torch.minimum(ramp, ramp.flip(0)).clamp_max(overlap + 1).view(broadcast)
            total, weights = v.new_zeros(shape), v.new_zeros(length).view(broadcast)
        total.narrow(axis, start, size).add_(weight * v)
        weights.narrow(0, start, size).add_(weight)
    return total / weights
