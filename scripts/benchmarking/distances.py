"""How far two outputs are from each other."""

from __future__ import annotations

import math

from torch import Tensor


def relative_difference(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||"""
    ours, reference = ours.double().cpu(), reference.double().cpu()
    return ((ours - reference).norm() / reference.norm()).item()


def psnr(video: Tensor, reference: Tensor) -> float:
    """The peak signal-to-noise ratio in dB of videos in about [-1, 1], as they would be shown: in [0, 1]."""
    shown, expected = (((each.double().cpu() + 1) / 2).clamp(0, 1) for each in (video, reference))
    mean_square = (shown - expected).square().mean().item()
    return -10 * math.log10(mean_square) if mean_square else math.inf
