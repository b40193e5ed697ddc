"""Wrappers around a velocity: guidance, and its use as a denoiser."""

from __future__ import annotations

from torch import Tensor

from .schedules import Denoiser, NoiseLevel, Velocity


def denoiser(velocity: Velocity) -> Denoiser:
    """Return the denoiser of a velocity: x0 = alpha x - sigma v."""
    return lambda x, level: level.alpha * x - level.sigma * velocity(x, level)


def guided(branches: Velocity, scale: float, rescale: float = 0.0) -> Velocity:
    """Guide without a classifier (https://arxiv.org/abs/2207.12598), rescaled (https://arxiv.org/abs/2305.08891).

    v = v_u + scale (v_c - v_u), then v (rescale std(v_c) / std(v) + 1 - rescale), the deviations over each
    whole sample.

    Args:
        branches: gives the conditional and the unconditional prediction, [2, B, C, F, h, w].
        scale, rescale: as above.
    """

    def velocity(x: Tensor, level: NoiseLevel) -> Tensor:
        v_c, v_u = branches(x, level)
        v = v_u + scale * (v_c - v_u)
        if rescale:
            ratio = v_c.flatten(1).std(dim=1) / v.flatten(1).std(dim=1).clamp_min(1e-12)
            v = v * (rescale * ratio + (1.0 - rescale)).view(-1, 1, 1, 1, 1)
        return v

    return velocity


def guided_within(interval: tuple[int, int], guided: Velocity, conditional: Velocity) -> Velocity:
    """Guide at the timesteps of an interval only, both ends included (https://arxiv.org/abs/2404.07724).

    An approximation: at the others the conditional branch alone is computed, and stands for both.
    """
    low, high = interval
    return lambda x, level: (guided if low <= level.t <= high else conditional)(x, level)
