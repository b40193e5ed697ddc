"""Stage two's sampling: SDEdit (https://arxiv.org/abs/2108.01073) with DPM-Solver++(2M) SDE or Heun.

The samplers work in the variance-exploding view, x = x0 + s n, and call ``denoise(x, s) -> x0``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Callable, Sequence

import numpy
import torch
import torchsde
from torch import Tensor

from .velocity import Velocity, denoised

NUM_TIMESTEPS = 1000

#: (x [B, C, F, h, w], s) -> x0, of x's shape
Denoiser = Callable[[Tensor, float], Tensor]
#: (s, s_next) -> unit normal noise for the step between them
NoiseSampler = Callable[[float, float], Tensor]
Callback = Callable[[int, float, Tensor], None]


def published_sigmas() -> Tensor:
    """Noise levels sigma by timestep, variance-preserving, float32 [1000], from about 0 to exactly 1.

    The log-SNR follows a cosine from 15 to -15 (https://arxiv.org/abs/2102.09672), shifted by
    2 log(1 / scale) (https://arxiv.org/abs/2301.11093) with the scale going from 2 to 4 as the noise
    grows; sigma is then stretched so that the last level is pure noise. The values are stored, not
    computed: processors differ in the last bit of a tangent, and a Brownian tree asked at a time one bit
    away gives other noise.
    """
    path = Path(__file__).with_name("sdedit_sigmas.npy")
    return torch.from_numpy(numpy.load(path, allow_pickle=False))


def _rounded(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A float32 function correctly rounded, and so the same on every processor."""
    return function(x.double()).float()


class SDEditSchedule:
    """Noise levels as sigma (variance-preserving, by integer timestep) and as s = sigma / alpha.

    Args:
        sigmas: float32 [1000], ascending.
    """

    def __init__(self, sigmas: Tensor):
        self.sigmas = sigmas
        self.alphas = torch.sqrt(1.0 - sigmas**2)
        self.log_s = _rounded(torch.log, torch.sqrt(sigmas**2 / (1.0 - sigmas**2)))

    def noise(self, x0: Tensor, noise: Tensor, t: int) -> Tensor:
        """x_t = alpha_t x0 + sigma_t noise."""
        return self.alphas[t].item() * x0 + self.sigmas[t].item() * noise

    def levels(self, timesteps: Tensor) -> Tensor:
        """s at real timesteps [N], interpolated in log s between the integer ones."""
        low, high, weight = timesteps.floor().long(), timesteps.ceil().long(), timesteps.frac()
        return _rounded(torch.exp, (1 - weight) * self.log_s[low] + weight * self.log_s[high])

    def timestep(self, s: float) -> int:
        """The integer timestep nearest to s, in log s."""
        log_s = _rounded(torch.log, torch.tensor(s))
        low = int((log_s >= self.log_s).sum().clamp(1, NUM_TIMESTEPS - 1)) - 1
        weight = ((self.log_s[low] - log_s) / (self.log_s[low] - self.log_s[low + 1])).clamp(0, 1)
        return int(((1 - weight) * low + weight * (low + 1)).round())

    def trailing(self, steps: int, noise_levels: int) -> Tensor:
        """s of ``steps`` network calls from timestep noise_levels - 1 down, then 0: [steps + 1].

        With fewer noise levels than steps, several would fall on the lowest level: those are one.
        """
        last = noise_levels - 1
        timesteps = torch.arange(steps, dtype=torch.float32) * -(noise_levels / steps) + last
        timesteps = torch.unique_consecutive(timesteps.clamp(min=0))
        return torch.cat([self.levels(timesteps), torch.zeros(1)])

    def denoiser(self, velocity: Velocity) -> Denoiser:
        """The denoiser of a velocity model, which sees the nearest integer timestep."""

        def denoise(x: Tensor, s: float) -> Tensor:
            t = self.timestep(s)
            x = x / math.sqrt(1.0 + s**2)
            return denoised(x, velocity(x, t), self.alphas[t].item(), self.sigmas[t].item())

        return denoise


def dpmpp_2m_sde_levels(schedule: SDEditSchedule, steps: int, noise_levels: int) -> Tensor:
    """s for ``steps`` calls of DPM-Solver++(2M) SDE: one more is laid out, and the last before 0 left out."""
    levels = schedule.trailing(steps + 1, noise_levels)
    return torch.cat([levels[: max(len(levels) - 2, 1)], levels[-1:]])


def heun_levels(schedule: SDEditSchedule, steps: int, noise_levels: int) -> Tensor:
    """s for ``steps`` steps of Heun's method, which are 2 steps - 1 calls."""
    return schedule.trailing(steps, noise_levels)


class BrownianNoise:
    """Noise of a step from a Brownian tree over s, one tree a sample, drawn on the CPU.

    The same entropy gives the same path whatever the steps and the device
    (https://arxiv.org/abs/2001.01328, as ``torchsde.BrownianTree``).

    Args:
        x: a state [B, C, F, h, w], for its shape and device.
        levels: s of the steps, for the smallest positive and the largest.
        entropies: B seeds.
    """

    def __init__(self, x: Tensor, levels: Tensor, entropies: Sequence[int]):
        start, end = self._rounded(levels[levels > 0].min().item()), self._rounded(levels.max().item())
        self.device = x.device
        zero = torch.zeros(1, *x.shape[1:])
        # With a single level the interval is a point, and no noise is ever asked for.
        end = end if end > start else start + 1.0
        self.trees = [torchsde.BrownianTree(start, zero, end, entropy=entropy) for entropy in entropies]

    @staticmethod
    def _rounded(s: float) -> float:
        # To the tree's own resolution: it warns of a query that lies beyond its rounded ends.
        return round(s, 6)

    def __call__(self, s: float, s_next: float) -> Tensor:
        """(W(s_next) - W(s)) / sqrt(s - s_next), of x's shape, for s > s_next > 0."""
        increments = torch.cat([tree(self._rounded(s_next), self._rounded(s)) for tree in self.trees])
        return (-increments / math.sqrt(s - s_next)).to(self.device)


def sample_dpmpp_2m_sde(
    denoise: Denoiser, x: Tensor, levels: Tensor, noise: NoiseSampler, callback: Callback | None = None
) -> Tensor:
    """DPM-Solver++(2M) SDE, midpoint, eta 1 (https://arxiv.org/abs/2211.01095, appendix).

    Args:
        denoise: predicts x0 at (x, s).
        x: the state at levels[0], [B, C, F, h, w].
        levels: s, descending, the last 0: [steps + 1].
        noise: the noise of a step; not called for the last one.
        callback: called with (step, s, x) after each step.
    """
    previous, previous_h = None, 0.0
    levels = levels.tolist()
    for step, (s, s_next) in enumerate(zip(levels, levels[1:])):
        x0 = denoise(x, s)
        if s_next == 0:
            x = x0
        else:
            h = math.log(s / s_next)  # the step in log-SNR / 2
            target = x0
            if previous is not None:
                target = x0 + 0.5 * (h / previous_h) * (x0 - previous)  # linear extrapolation to the midpoint
            x = (s_next / s) * math.exp(-h) * x - math.expm1(-2 * h) * target
            x = x + s_next * math.sqrt(-math.expm1(-2 * h)) * noise(s, s_next)
            previous, previous_h = x0, h
        if callback is not None:
            callback(step, s, x)
    return x


def sample_heun(denoise: Denoiser, x: Tensor, levels: Tensor, callback: Callback | None = None) -> Tensor:
    """Heun's second-order method for dx/ds = (x - x0) / s, without churn (https://arxiv.org/abs/2206.00364).

    Arguments as of ``sample_dpmpp_2m_sde``; the last step, to 0, is Euler's.
    """
    levels = levels.tolist()
    for step, (s, s_next) in enumerate(zip(levels, levels[1:])):
        slope = (x - denoise(x, s)) / s
        euler = x + (s_next - s) * slope
        if s_next == 0:
            x = euler
        else:
            slope_next = (euler - denoise(euler, s_next)) / s_next
            x = x + (s_next - s) * 0.5 * (slope + slope_next)
        if callback is not None:
            callback(step, s, x)
    return x
