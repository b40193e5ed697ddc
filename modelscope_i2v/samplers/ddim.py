"""Stage one's sampler: DDIM (https://arxiv.org/abs/2010.02502), deterministic, on a v-prediction."""

from __future__ import annotations

import math
from typing import Callable

import torch
from torch import Tensor

from .velocity import Velocity, denoised

NUM_TIMESTEPS = 1000


def alphas_cumprod() -> Tensor:
    """Products of 1 - beta for Stable Diffusion's betas, float64 [1000]."""
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), NUM_TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def ddim_timesteps(steps: int) -> list[int]:
    """The timesteps of ``steps`` network calls, descending.

    Where ``steps`` divides 1000 these are the published 1 + i 1000 / steps. Elsewhere the published
    layout has more than ``steps`` of them; this one has the number asked for, evenly spaced.
    """
    spaced = {min(1 + round(i * NUM_TIMESTEPS / steps), NUM_TIMESTEPS - 1) for i in range(steps)}
    return sorted(spaced, reverse=True)


def sample_ddim(
    velocity: Velocity,
    x: Tensor,
    timesteps: list[int],
    alphas: Tensor,
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Deterministic DDIM (eta 0) from the noise x to a clean latent, both [B, C, F, h, w].

    Args:
        velocity: the v-prediction at (x, t).
        x: the initial noise, float32.
        timesteps: descending; each step ends where the next begins, the last at timestep 0.
        alphas: cumulative alphas by timestep, float64 [1000].
        callback: called with (step, timestep, x) after each step.
    """
    for step, (t, t_next) in enumerate(zip(timesteps, [*timesteps[1:], 0])):
        alpha, sigma = alphas[t].sqrt().item(), (1.0 - alphas[t]).sqrt().item()
        alpha_next, sigma_next = alphas[t_next].sqrt().item(), (1.0 - alphas[t_next]).sqrt().item()
        x0 = denoised(x, velocity(x, t), alpha, sigma)
        noise = (x - alpha * x0) / sigma
        x = alpha_next * x0 + sigma_next * noise
        if callback is not None:
            callback(step, t, x)
    return x
