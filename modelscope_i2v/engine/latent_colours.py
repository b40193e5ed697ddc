"""Small pictures of latents without decoding them: a linear map from latent channels to colours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..models.autoencoder import SCALE_FACTOR, Autoencoder

_FRAMES, _POSITIONS = 8, 16  # drawn to fit the map, and latent positions along a side of each


@dataclass(frozen=True)
class LatentColours:
    """A linear map from latents to colours: one pixel for each latent position.

    Attributes:
        weights: [z + 1, 3] float32 on the CPU; the last row is the colour of zero.
    """

    weights: Tensor

    @classmethod
    @torch.no_grad()
    def fit(cls, autoencoder: Autoencoder) -> LatentColours:
        """Fit the map to an autoencoder, by least squares over a few drawn frames."""
        scale, generator = autoencoder.config.downscale, torch.Generator().manual_seed(0)
        device = autoencoder.quant_conv.weight.device
        drawn = torch.rand(_FRAMES, 3, 5, 5, generator=generator) * 2 - 1
        frames = F.interpolate(drawn, (_POSITIONS * scale,) * 2, mode="bilinear")
        means = [autoencoder.encode(frame[None].to(device)).mean for frame in frames]
        latents = SCALE_FACTOR * torch.cat(means).float().cpu()
        inputs = rearrange(latents, "n z h w -> (n h w) z")
        colours = rearrange(F.avg_pool2d(frames, scale), "n c h w -> (n h w) c")
        return cls(torch.linalg.lstsq(_with_one(inputs), colours).solution)

    def draw(self, latents: Tensor) -> Tensor:
        """Return the picture [h, w, 3] uint8, on the CPU, of one frame's latents [z, h, w]."""
        inputs = _with_one(rearrange(latents.float().cpu(), "z h w -> h w z"))
        return ((inputs @ self.weights / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)


def _with_one(inputs: Tensor) -> Tensor:
    """Append a channel of ones, which the constant of a linear map is multiplied with."""
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
