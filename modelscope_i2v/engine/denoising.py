"""The UNet as the velocity that the samplers integrate: guided, in windows, and with features used again."""

from __future__ import annotations

from functools import cached_property
from typing import Iterator

import torch
from torch import Tensor

from ..models.conditioning import Context
from ..models.unet import UNet
from ..samplers.velocity import Velocity, guided, guided_within, windowed
from ..settings.request import Request
from .memory.out_of_memory import with_less_at_a_time

#: Up to so many latent positions (b f h w), by device, both branches of guidance go through the UNet
#: together: its deep levels are too small for the device to be busy with one.
_TOGETHER = {"cuda": 65_536, "cpu": 4_096}

#: When memory runs out, layers take their input in parts of so much less at a time, down to this.
_LESS, _LEAST = 4, 2**18


def guided_velocity(unet: UNet, y: Tensor, negative_y: Tensor, request: Request, **told: Tensor) -> Velocity:
    """The velocity of a generation: a function of a float32 state [B, 4, F, h, w] and a timestep.

    Args:
        unet: where it is, in its parameters' type.
        y, negative_y: conditioning of the two branches of guidance, [B, N, D] each.
        request: ``guide_scale``, ``guide_rescale``, the windows, and what may be approximated.
        **told: what else the UNet is told, [B].
    """
    branches = _Branches(unet, y, negative_y, request.reuse_interval, told)

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
        self, unet: UNet, y: Tensor, negative_y: Tensor, reuse_interval: int, told: dict[str, Tensor]
    ):
        self._unet, self._told = unet, told
        self._device, self._batch = next(unet.parameters()).device, y.shape[0]
        self._y, self._negative_y = y.to(self._device), negative_y.to(self._device)
        self._reuse = _FeatureReuse(reuse_interval)

    def conditional(self, x: Tensor, t: int) -> Tensor:
        """[B, 4, F, h, w]"""
        return self._predict(x, t, [self._context], branches=1)[0]

    def both(self, x: Tensor, t: int) -> Tensor:
        """[2, B, 4, F, h, w]"""
        small = x[:, 0].numel() <= _TOGETHER.get(self._device.type, 0)
        together = small and self._y.shape == self._negative_y.shape
        contexts = [self._joint_context] if together else [self._context, self._negative_context]
        return torch.cat(self._predict(x, t, contexts, branches=2)).unflatten(0, (2, -1))

    # Each projected when it is first needed, and once.

    @cached_property
    def _context(self) -> Context:
        return self._unet.project_context(self._y)

    @cached_property
    def _negative_context(self) -> Context:
        return self._unet.project_context(self._negative_y)

    @cached_property
    def _joint_context(self) -> Context:
        return self._unet.project_context(torch.cat([self._y, self._negative_y]))

    def _predict(self, x: Tensor, t: int, contexts: list[Context], branches: int) -> list[Tensor]:
        timesteps = torch.full((self._batch,), t, device=self._device)
        features = self._reuse.features(t, branches)

        def predict(chunk: int) -> list[Tensor]:
            self._unet.chunk = chunk
            kept = None if features is None else list(features)
            predictions = self._unet.branches(x, timesteps, contexts, deep=kept, **self._told)
            if features is not None:
                features[:] = kept
            return [each.float() for each in predictions]

        words = "with layers in parts of {} elements"
        return with_less_at_a_time(predict, _chunks(self._unet.chunk), words, self._device)


def _chunks(chunk: int | None) -> Iterator[int | None]:
    """A chunk and smaller ones: what has once been too much stays so."""
    yield chunk
    chunk = 2**27 if chunk is None else chunk // _LESS
    while chunk >= _LEAST:
        yield chunk
        chunk //= _LESS


class _FeatureReuse:
    """Which of the UNet's calls compute its deep features, and which use those of an earlier one.

    The calls of one timestep are those of the windows of a long video, in order.
    """

    def __init__(self, interval: int):
        self._interval = interval
        self._timestep: int | None = None
        self._steps = -1
        self._window = 0
        self._kept: dict[tuple[int, int], list[Tensor]] = {}

    def features(self, t: int, branches: int) -> list[Tensor] | None:
        """For ``UNet.branches``: a list to fill, or a filled one; None where nothing is used again."""
        if self._interval == 1:
            return None
        if t != self._timestep:
            self._timestep, self._window = t, -1
            self._steps += 1
        self._window += 1
        if self._steps % self._interval == 0:
            self._kept[self._window, branches] = []
        return self._kept.setdefault((self._window, branches), [])
