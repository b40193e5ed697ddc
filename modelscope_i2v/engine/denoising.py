"""The UNet as the velocity that the samplers integrate: guided, in windows, and with features used again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator

import torch
from torch import Tensor

from ..models.unet import FeatureCache, UNet
from ..samplers.velocity import Velocity, guided, guided_within, windowed
from ..settings.request import Request
from .memory.out_of_memory import with_less_at_a_time

#: Up to so many latent positions (b f h w), by device, both branches of guidance go through the UNet
#: together: its deep levels are too small for the device to be busy with one.
_TOGETHER = {"cuda": 65_536, "cpu": 4_096}

#: When memory runs out, layers take their input in parts of so much less at a time, down to this.
_LESS, _LEAST = 4, 2**18


@dataclass
class ChunkLimit:
    """How many elements the largest tensor inside the UNet's layers may have.

    When memory runs out it becomes less, and stays so.
    """

    elements: int

    def and_less(self) -> Iterator[int]:
        """Yield the present limit and smaller ones."""
        elements = self.elements
        yield elements
        while (elements := elements // _LESS) >= _LEAST:
            yield elements


def guided_velocity(
    unet: UNet, y: Tensor, negative_y: Tensor, request: Request, limit: ChunkLimit, **conditions: Tensor
) -> Velocity:
    """Return the velocity of a generation, a function of a float32 state [B, 4, F, h, w] and a timestep.

    Args:
        unet: where it is, in its parameters' type.
        y, negative_y: conditioning of the two branches of guidance, [B, N, D] each.
        request: ``guide_scale``, ``guide_rescale``, the windows, and what may be approximated.
        limit: what the UNet takes at a time.
        **conditions: what else the UNet takes, [B].
    """
    branches = _Branches(unet, y, negative_y, request.reuse_interval, limit, conditions)

    def in_windows(velocity: Velocity) -> Velocity:
        return windowed(velocity, request.window, request.overlap)

    conditional = in_windows(branches.conditional)
    if request.guide_scale == 1.0:  # the unconditional branch would have no part in it
        return conditional
    velocity = guided(in_windows(branches.both), request.guide_scale, request.guide_rescale)
    if request.guidance_interval is not None:
        velocity = guided_within(request.guidance_interval, velocity, conditional)
    return velocity


class _Branches:
    """The UNet's predictions under one conditioning or two, in float32."""

    def __init__(
        self,
        unet: UNet,
        y: Tensor,
        negative_y: Tensor,
        reuse_interval: int,
        limit: ChunkLimit,
        conditions: dict[str, Tensor],
    ):
        self._unet, self._limit, self._conditions = unet, limit, conditions
        self._device, self._batch = next(unet.parameters()).device, y.shape[0]
        self._y, self._negative_y = y.to(self._device), negative_y.to(self._device)
        self._reuse = _FeatureReuse(reuse_interval)

    def conditional(self, x: Tensor, t: int) -> Tensor:
        """[B, 4, F, h, w]"""
        return self._predict(x, t, [self._y], branches=1)

    def both(self, x: Tensor, t: int) -> Tensor:
        """[2, B, 4, F, h, w]"""
        small = x[:, 0].numel() <= _TOGETHER.get(self._device.type, 0)
        contexts = [self._y, self._negative_y]
        if small and self._y.shape == self._negative_y.shape:
            contexts = [torch.cat(contexts)]
        return self._predict(x, t, contexts, branches=2).unflatten(0, (2, -1))

    def _predict(self, x: Tensor, t: int, contexts: list[Tensor], branches: int) -> Tensor:
        timesteps = torch.full((self._batch,), t, device=self._device)
        caches = self._reuse.caches(t, branches) or [None] * len(contexts)

        def predict(y: Tensor, cache: FeatureCache | None) -> Tensor:
            def predict_in_chunks(chunk: int) -> Tensor:
                self._limit.elements = chunk
                v = self._unet(x, timesteps, y, **self._conditions, cache=cache, chunk=chunk)
                return v.float()

            words = "with layers in parts of {} elements"
            return with_less_at_a_time(predict_in_chunks, self._limit.and_less(), words, self._device)

        return torch.cat([predict(y, cache) for y, cache in zip(contexts, caches)])


class _FeatureReuse:
    """Which of the UNet's calls compute its deep features, and which use those of an earlier one.

    The calls of one timestep are those of the windows of a long video, in order.
    """

    def __init__(self, interval: int):
        self._interval = interval
        self._timestep: int | None = None
        self._steps = -1
        self._window = 0
        self._kept: dict[tuple[int, int], list[FeatureCache]] = {}

    def caches(self, t: int, branches: int) -> list[FeatureCache]:
        """Return a cache for each call of the UNet that predicts the branches; none if nothing is reused."""
        if self._interval == 1:
            return []
        if t != self._timestep:
            self._timestep, self._window = t, -1
            self._steps += 1
        self._window += 1
        if self._steps % self._interval == 0 or (self._window, branches) not in self._kept:
            self._kept[self._window, branches] = [FeatureCache() for _ in range(branches)]
        return self._kept[self._window, branches]
