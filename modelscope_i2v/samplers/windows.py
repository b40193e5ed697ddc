"""Long videos in overlapping windows of frames."""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedules import NoiseLevel, Velocity

#: (a window of x [B, C, f, h, w], level, its first frame) -> v [.., B, C, f, h, w]
WindowVelocity = Callable[[Tensor, NoiseLevel, int], Tensor]


def window_starts(frames: int, size: int, overlap: int) -> list[int]:
    """Return the starts of windows of ``size`` frames that cover ``frames``, ``overlap`` or more in common.

    The last window is moved back to end with the video, so that all are of full size.
    """
    if frames <= size:
        return [0]
    return [*range(0, frames - size, size - overlap), frames - size]


def windowed(velocity: WindowVelocity, size: int, overlap: int) -> Velocity:
    """Predict long videos in overlapping windows of ``size`` frames, blended where they overlap.

    Every step blends the windows' predictions, weighted down towards each window's ends (as
    https://arxiv.org/abs/2302.08113 does in space), so all frames are denoised together, without seams.
    """

    def blended(x: Tensor, level: NoiseLevel) -> Tensor:
        frames = x.shape[2]
        if frames <= size:
            return velocity(x, level, 0)
        ramp = torch.arange(1, size + 1, device=x.device, dtype=x.dtype)
        weight = torch.minimum(ramp, ramp.flip(0)).clamp_max(overlap + 1).view(-1, 1, 1)
        total, weights = x.new_zeros(()), x.new_zeros(frames, 1, 1)
        for start in window_starts(frames, size, overlap):
            window = slice(start, start + size)
            padding = (0, 0, 0, 0, start, frames - start - size)
            total = total + F.pad(weight * velocity(x[:, :, window], level, start), padding)
            weights[window] += weight
        return total / weights

    return blended
