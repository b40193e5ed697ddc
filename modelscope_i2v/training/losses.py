"""Losses: functions of predictions and targets that know nothing of networks, data or the loop."""

from __future__ import annotations

import torch
from torch import Tensor


def reconstruction_loss(
    images: Tensor, target: Tensor, chroma: float = 0.3, absolute: float = 0.05
) -> Tensor:
    """Squared error of pixels, of two colour differences, and a little absolute error.

    The colour differences are R - G and B - (R + G) / 2: without their term, networks learn brightness
    first and hues late.

    Args:
        images, target: [N, 3, H, W].
        chroma, absolute: weights of the second and third term.
    """
    error = images - target
    red, green, blue = error.unbind(1)
    hue = (red - green).square().mean() + (blue - (red + green) / 2).square().mean()
    return error.square().mean() + chroma * hue / 2 + absolute * error.abs().mean()


def second_moment_penalty(latents: Tensor, deviations: Tensor) -> Tensor:
    """||E[z z^T] - diag(s^2)||^2 / C over all positions of latents [N, C, h, w], s the deviations [C].

    It makes every channel carry something, uncorrelated and of known variance, as diffusion needs it.
    """
    positions = latents.transpose(0, 1).flatten(1)
    second_moment = positions @ positions.T / positions.shape[1]
    return (second_moment - torch.diag(deviations.square())).square().sum() / len(deviations)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Mean KL divergence of normals from the unit normal: (m^2 + s^2 - 1 - log s^2) / 2."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def velocity_target(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha n - sigma x0 (https://arxiv.org/abs/2202.00512), levels [B] for tensors [B, ..]."""
    shape = (-1, *[1] * (x0.ndim - 1))
    return alpha.view(shape) * noise - sigma.view(shape) * x0


def velocity_loss(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of v, each sample's multiplied with its weight [B]."""
    errors = (prediction.float() - target).square().flatten(1).mean(1)
    return errors.mean() if weights is None else (errors * weights).mean()
