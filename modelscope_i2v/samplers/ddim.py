"""DDIM (https://arxiv.org/abs/2010.02502), deterministic."""

from __future__ import annotations

from typing import Sequence

from torch import Tensor

from .schedules import Callback, Denoiser, NoiseLevel


def sample_ddim(
    denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel], callback: Callback | None = None
) -> Tensor:
    """Sample with DDIM (eta 0): keep the noise that a prediction implies, and mix it in at the next level.

    Args:
        denoise: predicts x0.
        x: variance-preserving noise at levels[0], [B, C, F, h, w].
        levels: descending; the last is where the result is, and is not called.
        callback: called with (step, timestep, x) after each step.

    Returns:
        x at levels[-1].
    """
    for step, (level, following) in enumerate(zip(levels, levels[1:])):
        x0 = denoise(x, level)
        noise = (x - level.alpha * x0) / level.sigma
        x = following.alpha * x0 + following.sigma * noise
        if callback is not None:
            callback(step, level.t, x)
    return x
