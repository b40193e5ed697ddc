"""Noise levels: what a sampler steps through, and the two stages' tables of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy
import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class NoiseLevel:
    """The noise of x = alpha x0 + sigma n.

    Attributes:
        t: the integer timestep that a network is called with.
        alpha, sigma: at that timestep.
        s: sigma / alpha. Between two timesteps it may lie, and then is not exactly that of t.
        number: the position among a sampler's levels.
    """

    t: int
    alpha: float
    sigma: float
    s: float
    number: int = 0


#: (x [B, C, F, h, w], level) -> x0 or v, of x's shape
Denoiser = Callable[[Tensor, NoiseLevel], Tensor]
Velocity = Callable[[Tensor, NoiseLevel], Tensor]
#: Called after each step with (step, timestep or s, x).
Callback = Callable[[int, float, Tensor], None]
#: Called after each step with its state, before the callback.
SaveState = Callable[["SolverState"], None]


@dataclass(frozen=True, eq=False)
class SolverState:
    """Where a sampler stands between two steps, enough to go on from.

    Attributes:
        step: how many steps are done.
        x: the state after them.
        previous: what was predicted in the last of them, for a solver of two steps.
    """

    step: int
    x: Tensor
    previous: Tensor | None = None

    def to(self, device: torch.device) -> SolverState:
        """Return the state on a device."""
        previous = None if self.previous is None else self.previous.to(device)
        return SolverState(self.step, self.x.to(device), previous)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Tables by timestep, [1000]: ``alphas``, ``sigmas`` and, ascending, ``log_s`` = log(sigma / alpha)."""

    alphas: Tensor
    sigmas: Tensor
    log_s: Tensor

    def level(self, t: int, s: float | None = None, number: int = 0) -> NoiseLevel:
        """Return the level of a timestep; with ``s`` between two timesteps, if it is given."""
        alpha, sigma = self.alphas[t].item(), self.sigmas[t].item()
        return NoiseLevel(t, alpha, sigma, sigma / alpha if s is None else s, number)

    def add_noise(self, x0: Tensor, noise: Tensor, t: int) -> Tensor:
        """Return x_t = alpha_t x0 + sigma_t noise."""
        return self.alphas[t].item() * x0 + self.sigmas[t].item() * noise

    def s_at(self, timesteps: Tensor) -> Tensor:
        """Return s at real timesteps [N], interpolated in log s between the integer ones."""
        low, high, weight = timesteps.floor().long(), timesteps.ceil().long(), timesteps.frac()
        return _rounded(torch.exp, (1 - weight) * self.log_s[low] + weight * self.log_s[high])

    def nearest(self, s: float) -> int:
        """Return the integer timestep nearest to s, in log s."""
        log_s = _rounded(torch.log, torch.tensor(s))
        low = int((log_s >= self.log_s).sum().clamp(1, NUM_TIMESTEPS - 1)) - 1
        weight = ((self.log_s[low] - log_s) / (self.log_s[low] - self.log_s[low + 1])).clamp(0, 1)
        return int(((1 - weight) * low + weight * (low + 1)).round())


def _rounded(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a float32 function correctly rounded, and so alike on every processor."""
    return function(x.double()).float()


def stable_diffusion_schedule() -> NoiseSchedule:
    """Return stage one's schedule, float64: betas = linspace(sqrt 0.00085, sqrt 0.012, 1000)^2."""
    start, end = math.sqrt(0.00085), math.sqrt(0.012)
    betas = torch.linspace(start, end, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    alphas_squared = torch.cumprod(1.0 - betas, dim=0)
    log_s = (1.0 / alphas_squared - 1.0).sqrt().log()
    return NoiseSchedule(alphas_squared.sqrt(), (1.0 - alphas_squared).sqrt(), log_s)


def sdedit_schedule() -> NoiseSchedule:
    """Return stage two's schedule, float32, from about no noise to noise alone.

    The log-SNR follows a cosine from 15 to -15 (https://arxiv.org/abs/2102.09672), shifted by
    2 log(1 / scale) (https://arxiv.org/abs/2301.11093) with the scale going from 2 to 4 as the noise
    grows; sigma is then stretched so that the last level is pure noise. The values are stored, not
    computed: processors differ in the last bit of a tangent, and a Brownian tree asked at a time one bit
    away gives other noise.
    """
    path = Path(__file__).with_name("sdedit_sigmas.npy")
    sigmas = torch.from_numpy(numpy.load(path, allow_pickle=False))
    log_s = _rounded(torch.log, torch.sqrt(sigmas**2 / (1.0 - sigmas**2)))
    return NoiseSchedule(torch.sqrt(1.0 - sigmas**2), sigmas, log_s)


def ddim_levels(schedule: NoiseSchedule, steps: int) -> list[NoiseLevel]:
    """Return the levels of ``steps`` network calls, descending, and timestep 0 after them.

    Where ``steps`` divides 1000 these are the published 1 + i 1000 / steps. Elsewhere the published
    layout has more than ``steps`` of them; this one has the number asked for, evenly spaced.
    """
    steps = min(steps, NUM_TIMESTEPS - 1)  # there are no more between 1 and 999
    latest = range(NUM_TIMESTEPS - steps, NUM_TIMESTEPS)  # that leave one for each step to follow
    spaced = [1 + round(i * NUM_TIMESTEPS / steps) for i in range(steps)]
    return _at_timesteps(schedule, [min(pair) for pair in zip(spaced, latest)][::-1])


def karras_levels(schedule: NoiseSchedule, steps: int) -> list[NoiseLevel]:
    """Return the levels of ``steps`` network calls, descending from 999 to 1, and timestep 0 after them.

    They are evenly spaced in s^(1/7) (https://arxiv.org/abs/2206.00364, equation 5 with rho 7), and so more
    closely towards the end, where a step of equal length in t is long in log s. So many steps that two would
    fall on one timestep are fewer.
    """
    rho = 7.0
    first, last = (schedule.log_s[[NUM_TIMESTEPS - 1, 1]] / rho).exp().tolist()
    wanted = rho * torch.linspace(first, last, steps, dtype=torch.float64).log()
    nearest = (schedule.log_s - wanted[:, None]).abs().argmin(dim=1)
    return _at_timesteps(schedule, nearest.unique().flip(0).tolist())


def _at_timesteps(schedule: NoiseSchedule, timesteps: list[int]) -> list[NoiseLevel]:
    return [schedule.level(t, number=number) for number, t in enumerate([*timesteps, 0])]


def heun_levels(schedule: NoiseSchedule, steps: int, noise_levels: int) -> list[NoiseLevel]:
    """Return ``steps`` levels, evenly spaced in t from noise_levels - 1 down, and s = 0 after them."""
    return _at_s(schedule, _trailing(schedule, steps, noise_levels))


def dpmpp_2m_sde_levels(schedule: NoiseSchedule, steps: int, noise_levels: int) -> list[NoiseLevel]:
    """Return the levels of ``heun_levels`` for one step more, without the last before s = 0."""
    s = _trailing(schedule, steps + 1, noise_levels)
    return _at_s(schedule, s[: max(len(s) - 1, 1)])


def _trailing(schedule: NoiseSchedule, steps: int, noise_levels: int) -> list[float]:
    """Return s of the steps. With fewer noise levels than steps, several on the lowest level are one."""
    timesteps = torch.arange(steps, dtype=torch.float32) * -(noise_levels / steps) + (noise_levels - 1)
    return schedule.s_at(torch.unique_consecutive(timesteps.clamp(min=0))).tolist()


def _at_s(schedule: NoiseSchedule, s: list[float]) -> list[NoiseLevel]:
    levels = [schedule.level(schedule.nearest(each), each, number) for number, each in enumerate(s)]
    return [*levels, NoiseLevel(0, 1.0, 0.0, 0.0, len(levels))]
