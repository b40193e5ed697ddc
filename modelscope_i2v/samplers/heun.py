"""Heun's second-order method (https://arxiv.org/abs/2206.00364), without churn."""

from __future__ import annotations

import math
from typing import Sequence

from torch import Tensor

from .schedules import Callback, Denoiser, NoiseLevel, SaveState, SolverState


def sample_heun(
    denoise: Denoiser,
    x: Tensor | SolverState,
    levels: Sequence[NoiseLevel],
    callback: Callback | None = None,
    save: SaveState | None = None,
) -> Tensor:
    """Solve dx/ds = (x - x0) / s with Heun's method; the last step, to s = 0, is Euler's.

    Args:
        denoise: predicts x0.
        x: the variance-exploding state x0 + s n at levels[0], [B, C, F, h, w], or a saved one to go on from.
        levels: descending, the last with s = 0.
        callback: called with (step, s, x) after each step.
        save: called with the state after each step.

    Returns:
        x0.
    """

    def slope_at(x: Tensor, level: NoiseLevel) -> Tensor:
        return (x - denoise(x / math.sqrt(1.0 + level.s**2), level)) / level.s

    state = x if isinstance(x, SolverState) else SolverState(0, x)
    x = state.x
    for step in range(state.step, len(levels) - 1):
        level, following = levels[step], levels[step + 1]
        slope = slope_at(x, level)
        euler = x + (following.s - level.s) * slope
        if following.s == 0:
            x = euler
        else:
            x = x + (following.s - level.s) * 0.5 * (slope + slope_at(euler, following))
        if save is not None:
            save(SolverState(step + 1, x))
        if callback is not None:
            callback(step, level.s, x)
    return x
