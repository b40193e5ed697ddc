"""DPM-Solver++(2M), deterministic and as an SDE (https://arxiv.org/abs/2211.01095).

At as many steps it is closer than DDIM to where infinitely many would lead, and so needs fewer.
"""

from __future__ import annotations

import math
from typing import Callable, Sequence

import torch
import torchsde
from torch import Tensor

from .schedules import Callback, Denoiser, NoiseLevel, SaveState, SolverState

#: (s, s_next) -> unit normal noise for the step between them
NoiseSampler = Callable[[float, float], Tensor]


def sample_dpmpp_2m(
    denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel], callback: Callback | None = None
) -> Tensor:
    """Sample with DPM-Solver++(2M), algorithm 2 of the paper.

    With lambda = log(alpha / sigma), a step of h in lambda is x' = (sigma' / sigma) x - alpha' (e^-h - 1) D,
    where D is x0 extrapolated to the step's middle from the prediction before.
    The first and the last step take x0 itself: there is nothing before the one, and the other, down to
    hardly any noise, is so long in lambda that extrapolation would overshoot.

    Args and result as of ``sample_ddim``.
    """
    previous: Tensor | None = None
    previous_h = 0.0
    for step, (level, following) in enumerate(zip(levels, levels[1:])):
        x0 = denoise(x, level)
        h = math.log(following.alpha / following.sigma) - math.log(level.alpha / level.sigma)
        target = x0
        if previous is not None and step < len(levels) - 2:
            target = x0 + 0.5 * (h / previous_h) * (x0 - previous)
        x = (following.sigma / level.sigma) * x - following.alpha * math.expm1(-h) * target
        previous, previous_h = x0, h
        if callback is not None:
            callback(step, level.t, x)
    return x


def sample_dpmpp_2m_sde(
    denoise: Denoiser,
    x: Tensor | SolverState,
    levels: Sequence[NoiseLevel],
    noise: NoiseSampler,
    callback: Callback | None = None,
    save: SaveState | None = None,
) -> Tensor:
    """Sample with DPM-Solver++(2M) SDE, midpoint, eta 1 (appendix of the paper).

    Args:
        denoise: predicts x0.
        x: the variance-exploding state x0 + s n at levels[0], [B, C, F, h, w], or a saved one to go on from.
        levels: descending, the last with s = 0.
        noise: the noise of a step; not called for the last one.
        callback: called with (step, s, x) after each step.
        save: called with the state after each step.

    Returns:
        x0.
    """
    state = x if isinstance(x, SolverState) else SolverState(0, x)
    x, previous = state.x, state.previous
    for step in range(state.step, len(levels) - 1):
        s, s_next = levels[step].s, levels[step + 1].s
        x0 = denoise(x / math.sqrt(1.0 + s**2), levels[step])
        if s_next == 0:
            x = x0
        else:
            h = math.log(s / s_next)  # the step in log-SNR / 2
            target = x0
            if previous is not None:  # linear extrapolation to the midpoint
                target = x0 + 0.5 * (h / math.log(levels[step - 1].s / s)) * (x0 - previous)
            x = (s_next / s) * math.exp(-h) * x - math.expm1(-2 * h) * target
            x = x + s_next * math.sqrt(-math.expm1(-2 * h)) * noise(s, s_next)
        previous = x0
        if save is not None:
            save(SolverState(step + 1, x, previous))
        if callback is not None:
            callback(step, s, x)
    return x


class BrownianNoise:
    """Noise of a step from a Brownian tree over s, one tree a sample, drawn on the CPU.

    The same entropy gives the same path whatever the steps and the device
    (https://arxiv.org/abs/2001.01328, as ``torchsde.BrownianTree``).

    Args:
        x: a state [B, C, F, h, w], for its shape and device.
        levels: of the steps, for the smallest positive s and the largest.
        entropies: B seeds.
    """

    def __init__(self, x: Tensor, levels: Sequence[NoiseLevel], entropies: Sequence[int]):
        positive = [level.s for level in levels if level.s > 0]
        start, end = self._rounded(min(positive)), self._rounded(max(positive))
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
        """Return (W(s_next) - W(s)) / sqrt(s - s_next), of x's shape, for s > s_next > 0."""
        increments = torch.cat([tree(self._rounded(s_next), self._rounded(s)) for tree in self.trees])
        return (-increments / math.sqrt(s - s_next)).to(self.device)
