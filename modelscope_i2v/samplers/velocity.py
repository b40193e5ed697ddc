"""Wrappers around a velocity model: guidance, temporal windows, and its use as a denoiser."""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: (x [B, C, F, h, w], integer timestep) -> v, of x's shape
Velocity = Callable[[Tensor, int], Tensor]


def guided(branches: Velocity, scale: float, rescale: float = 0.0) -> Velocity:
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598), rescaled (https://arxiv.org/abs/2305.08891).

    v = v_u + scale (v_c - v_u), then v (rescale std(v_c) / std(v) + 1 - rescale), the deviations over each
    whole sample.

    Args:
        branches: gives the conditional and the unconditional prediction, [2, B, C, F, h, w].
        scale, rescale: as above.
    """

    def velocity(x: Tensor, t: int) -> Tensor:
        v_c, v_u = branches(x, t)
        v = v_u + scale * (v_c - v_u)
        if rescale:
            ratio = v_c.flatten(1).std(dim=1) / v.flatten(1).std(dim=1).clamp_min(1e-12)
            v = v * (rescale * ratio + (1.0 - rescale)).view(-1, 1, 1, 1, 1)
        return v

    return velocity


def guided_within(interval: tuple[int, int], guided: Velocity, conditional: Velocity) -> Velocity:
    """Guidance at the timesteps of an interval only, both ends included (https://arxiv.org/abs/2404.07724).

    An approximation: at the others the conditional branch alone is computed, and stands for both.
    """
    low, high = interval
    return lambda x, t: guided(x, t) if low <= t <= high else conditional(x, t)


def window_starts(frames: int, size: int, overlap: int) -> list[int]:
    """Starts of the windows of ``size`` frames that cover ``frames``, with at least ``overlap`` in common.

    The last window is moved back to end with the video, so that all are of full size.
    """
    if frames <= size:
        return [0]
    return [*range(0, frames - size, size - overlap), frames - size]


def windowed(velocity: Velocity, size: int, overlap: int) -> Velocity:
    """Predicts long videos in overlapping windows of ``size`` frames, blended where they overlap.

    Every step blends the windows' predictions, weighted down towards each window's ends (as
    https://arxiv.org/abs/2302.08113 does in space), so all frames are denoised together, without seams.
    ``velocity`` may give several predictions at once: [.., B, C, F, h, w].
    """

    def blended(x: Tensor, t: int) -> Tensor:
        frames = x.shape[2]
        if frames <= size:
            return velocity(x, t)
        ramp = torch.arange(1, size + 1, device=x.device, dtype=x.dtype)
        weight = torch.minimum(ramp, ramp.flip(0)).clamp_max(overlap + 1).view(-1, 1, 1)
        total, weights = 0.0, x.new_zeros(frames, 1, 1)
        for start in window_starts(frames, size, overlap):
            window = slice(start, start + size)
            padding = (0, 0, 0, 0, start, frames - start - size)
            total = total + F.pad(weight * velocity(x[:, :, window], t), padding)
            weights[window] += weight
        return total / weights

    return blended


def denoised(x: Tensor, v: Tensor, alpha: float, sigma: float) -> Tensor:
    """x0 of a variance-preserving x = alpha x0 + sigma n, from its velocity v = alpha n - sigma x0."""
    return alpha * x - sigma * v
