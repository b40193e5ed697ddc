"""What the UNet learns: the velocity of noised clips, by the noise and the conditions it is sampled with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from torch import Tensor

from ..engine.latents import draw_noise
from ..models.autoencoder import SCALE_FACTOR
from ..samplers.schedules import NoiseSchedule
from .encoding import EncodedClip
from .losses import velocity_loss, velocity_target


@dataclass(frozen=True)
class Batch:
    """Clips of one shape.

    Attributes:
        mean, logvar: the autoencoder's posterior [B, C, F, h, w].
        y: the conditions [B, N, D].
        fps: frames per second [B].
    """

    mean: Tensor
    logvar: Tensor
    y: Tensor
    fps: Tensor

    @classmethod
    def of(cls, clips: Sequence[EncodedClip]) -> Batch:
        """Read clips of one bucket."""
        tensors = [clip.tensors() for clip in clips]
        mean, logvar, y = (
            torch.stack([each[name] for each in tensors]).float() for name in ("mean", "logvar", "y")
        )
        return cls(mean, logvar, y, torch.tensor([each.clip.fps for each in clips]))


@dataclass(frozen=True)
class Objective:
    """The mean squared error of v = alpha n - sigma x0 at x = alpha x0 + sigma n.

    Attributes:
        schedule: the stage's own noise levels.
        levels: timesteps 0 .. levels - 1 are drawn, evenly: those that sampling begins at or below.
        offset: strength of the offset noise, as sampling adds it.
        drop: probability of the unconditional one in place of a clip's condition.
        unconditional: that condition [N, D].
        takes_fps: whether the network takes the frame rate.
        start: probability of the last timestep with x = sigma n, as stage one's sampling begins: no trace of
            the clip is in it.
    """

    schedule: NoiseSchedule
    levels: int
    offset: float
    drop: float
    unconditional: Tensor
    takes_fps: bool
    start: float = 0.0

    def loss(self, predict: Callable[..., Tensor], batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the loss of a batch. All is drawn from the CPU generator, in one order on every device.

        Args:
            predict: the UNet, called as ``predict(x, t, y)``, with ``fps`` in stage one.
            batch: on the CPU or the UNet's device.
            generator: on the CPU.
        """
        count, device = len(batch.mean), batch.mean.device
        posterior_noise = torch.randn(batch.mean.shape, generator=generator).to(device)
        noise = draw_noise(generator, batch.mean.shape, self.offset).to(device)
        t = torch.randint(self.levels, (count,), generator=generator)
        at_start = torch.rand(count, generator=generator) < self.start
        t[at_start] = self.levels - 1
        dropped = (torch.rand(count, generator=generator) < self.drop).to(device)

        x0 = SCALE_FACTOR * (batch.mean + torch.exp(0.5 * batch.logvar) * posterior_noise)
        alpha, sigma = (
            levels[t].float().to(device) for levels in (self.schedule.alphas, self.schedule.sigmas)
        )
        seen = alpha * ~at_start.to(device)
        x = seen.view(-1, 1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1, 1) * noise
        y = torch.where(dropped.view(-1, 1, 1), self.unconditional.to(batch.y), batch.y)
        fps = {"fps": batch.fps} if self.takes_fps else {}
        return velocity_loss(predict(x, t.to(device), y, **fps), velocity_target(x0, noise, alpha, sigma))
