"""A faster sampler for stage one: DPM-Solver++(2M) (https://arxiv.org/abs/2211.01095), deterministic.

At as many steps it is closer than DDIM to where infinitely many would lead, and so needs fewer; but that is
another video than the published sampler's.
"""

from __future__ import annotations

import math
from typing import Callable

import torch
from torch import Tensor

from .ddim import NUM_TIMESTEPS, DDIMSchedule
from .velocity import Velocity, denoised

_RHO = 7.0


def karras_timesteps(schedule: DDIMSchedule, steps: int) -> list[int]:
    """The timesteps of ``steps`` calls, descending from 999 to 1, spaced as by Karras et al. with rho 7.

    They are evenly spaced in (sigma / alpha)^(1/7) (https://arxiv.org/abs/2206.00364, equation 5), and so
    more closely towards the end, where a step of equal length in t is long in lambda. So many steps that
    two would fall on one timestep are fewer.
    """
    ratios = (1.0 / schedule.alphas_cumprod - 1.0).sqrt()  # sigma / alpha, ascending
    root = ratios[[NUM_TIMESTEPS - 1, 1]] ** (1 / _RHO)
    wanted = torch.linspace(root[0].item(), root[1].item(), steps, dtype=torch.float64) ** _RHO
    nearest = (ratios.log() - wanted.log()[:, None]).abs().argmin(dim=1)
    return nearest.unique().flip(0).tolist()


def sample_dpmpp_2m(
    velocity: Velocity,
    x: Tensor,
    schedule: DDIMSchedule,
    timesteps: list[int],
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """From the noise x to a clean latent, both [B, C, F, h, w].

    With lambda = log(alpha / sigma), a step of h in lambda is x' = (sigma' / sigma) x - alpha' (e^-h - 1) D,
    where D is x0 extrapolated to the step's middle from the prediction before (algorithm 2 of the paper).
    The first and the last step take x0 itself: there is nothing before the one, and the other, down to
    hardly any noise, is so long in lambda that extrapolation would overshoot.

    Arguments as of ``sample_ddim``.
    """
    previous: Tensor | None = None
    previous_h = 0.0
    for step, (t, t_next) in enumerate(zip(timesteps, [*timesteps[1:], 0])):
        alpha, sigma = schedule.level(t)
        alpha_next, sigma_next = schedule.level(t_next)
        x0 = denoised(x, velocity(x, t), alpha, sigma)
        h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
        target = x0
        if previous is not None and step < len(timesteps) - 1:
            target = x0 + 0.5 * (h / previous_h) * (x0 - previous)
        x = (sigma_next / sigma) * x - alpha_next * math.expm1(-h) * target
        previous, previous_h = x0, h
        if callback is not None:
            callback(step, t, x)
    return x
