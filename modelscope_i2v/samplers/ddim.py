"""Stage one's sampler: DDIM (https://arxiv.org/abs/2010.02502), deterministic, on a v-prediction."""

from __future__ import annotations

import math
from typing import Callable

import torch
from torch import Tensor

from .velocity import Velocity, denoised

NUM_TIMESTEPS = 1000


class DDIMSchedule:
    """Noise levels by timestep: ``alphas_cumprod``, float64 [1000], for Stable Diffusion's betas."""

    def __init__(self):
        start, end = math.sqrt(0.00085), math.sqrt(0.012)
        betas = torch.linspace(start, end, NUM_TIMESTEPS, dtype=torch.float64) ** 2
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)

    def level(self, t: int) -> tuple[float, float]:
        """(alpha, sigma) of x_t = alpha x0 + sigma n."""
        alpha_squared = self.alphas_cumprod[t]
        return alpha_squared.sqrt().item(), (1.0 - alpha_squared).sqrt().item()

    @staticmethod
    def timesteps(steps: int) -> list[int]:
        """The timesteps of ``steps`` network calls, descending.

        Where ``steps`` divides 1000 these are the published 1 + i 1000 / steps. Elsewhere the published
        layout has more than ``steps`` of them; this one has the number asked for, evenly spaced.
        """
        steps = min(steps, NUM_TIMESTEPS - 1)  # there are no more between 1 and 999
        latest = range(NUM_TIMESTEPS - steps, NUM_TIMESTEPS)  # that leave one for each step to follow
        spaced = [1 + round(i * NUM_TIMESTEPS / steps) for i in range(steps)]
        return [min(pair) for pair in zip(spaced, latest)][::-1]


def sample_ddim(
    velocity: Velocity,
    x: Tensor,
    schedule: DDIMSchedule,
    timesteps: list[int],
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Deterministic DDIM (eta 0) from the noise x to a clean latent, both [B, C, F, h, w].

    Args:
        velocity: the v-prediction at (x, t).
        x: the initial noise, float32.
        schedule: the noise levels.
        timesteps: descending; each step ends where the next begins, the last at timestep 0.
        callback: called with (step, timestep, x) after each step.
    """
    for step, (t, t_next) in enumerate(zip(timesteps, [*timesteps[1:], 0])):
        alpha, sigma = schedule.level(t)
        alpha_next, sigma_next = schedule.level(t_next)
        x0 = denoised(x, velocity(x, t), alpha, sigma)
        noise = (x - alpha * x0) / sigma
        x = alpha_next * x0 + sigma_next * noise
        if callback is not None:
            callback(step, t, x)
    return x
