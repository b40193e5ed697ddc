"""The UNet as the denoiser that the samplers take: guided, in windows, and with features used again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator

import torch
from torch import Tensor

from ..errors import NumericalError
from ..models.unet import FeatureCache, UNet
from ..samplers.guidance import denoiser, guided, guided_within
from ..samplers.schedules import Denoiser, NoiseLevel, Velocity
from ..samplers.windows import Origin, TileVelocity, WindowVelocity, tiled, windowed
from ..settings.request import Request
from ..weights.loading import precision_name
from .memory.out_of_memory import with_less_at_a_time
from .memory.tiles import TileLimit
from .spreading import Spread

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

    def __post_init__(self) -> None:
        self._before = self.elements

    def reset(self) -> None:
        """Allow as many as at the beginning."""
        self.elements = self._before

    def and_less(self) -> Iterator[int]:
        """Yield the present limit and smaller ones."""
        elements = self.elements
        yield elements
        while (elements := elements // _LESS) >= _LEAST:
            yield elements


#: A wrapper around the prediction of a window.
WindowWrapper = Callable[[WindowVelocity], WindowVelocity]


def guided_denoiser(
    unet: UNet,
    y: Tensor,
    negative_y: Tensor,
    request: Request,
    limit: ChunkLimit,
    tiles: TileLimit | None = None,
    latent_scale: int = 8,
    remember: WindowWrapper = lambda velocity: velocity,
    fps: Tensor | None = None,
    spread: Spread = Spread(),  # noqa: B008 - it has no state
) -> Denoiser:
    """Return the denoiser of a generation, for float32 states [B, 4, F, h, w].

    It raises ``NumericalError`` where its result would not be finite.

    Args:
        unet: where it is, in its parameters' type.
        y, negative_y: conditioning of the two branches of guidance, [B, N, D] each.
        request: ``guide_scale``, ``guide_rescale``, the windows, and what may be approximated.
        limit: what the UNet takes at a time.
        tiles: in which large frames go through; without it they do as wholes.
        latent_scale: pixels of a latent position.
        remember: is put around the prediction of each window.
        fps: of stage one's videos, [B].
        spread: the processes that share windows, or of a single window the branches.
    """
    branches = _Branches(unet, y, negative_y, request.reuse_interval, limit, fps)

    def over_window(velocity: TileVelocity) -> WindowVelocity:
        def of_window(x: Tensor, level: NoiseLevel, start: int) -> Tensor:
            return velocity(x, level, (start, 0, 0))

        inner = of_window if tiles is None else _in_tiles(velocity, tiles, unet, latent_scale, limit)
        return remember(inner)

    def over_video(velocity: TileVelocity) -> Velocity:
        return windowed(over_window(velocity), request.window, request.overlap, spread.parts)

    conditional = over_video(branches.conditional)
    velocity = conditional
    if request.guide_scale != 1.0:  # else the unconditional branch would have no part in it
        both = over_video(branches.both)
        if spread.count > 1:
            both = _by_windows(request.window, over_window(branches.spread_by(spread)), both)
        velocity = guided(both, request.guide_scale, request.guide_rescale)
        if request.guidance_interval is not None:
            velocity = guided_within(request.guidance_interval, velocity, conditional)
    return _finite(denoiser(velocity), precision_name(unet.dtype))


def _by_windows(window: int, single: WindowVelocity, several: Velocity) -> Velocity:
    """Choose by whether a video is one window or more."""

    def velocity(x: Tensor, level: NoiseLevel) -> Tensor:
        return single(x, level, 0) if x.shape[2] <= window else several(x, level)

    return velocity


def _in_tiles(
    velocity: TileVelocity, tiles: TileLimit, unet: UNet, scale: int, limit: ChunkLimit
) -> WindowVelocity:
    """Predict frames in tiles: of the size that was asked for, or of what memory there is for."""

    def predict(x: Tensor, level: NoiseLevel, start: int) -> Tensor:
        frame = scale * max(x.shape[3:])

        def in_tiles(size: int) -> Tensor:
            if size != (tiles.size or frame):
                tiles.size = size
                limit.reset()
            return tiled(velocity, *tiles.layout(size, unet.config, scale))(x, level, start)

        words = "with frames in tiles of {} pixels"
        return with_less_at_a_time(in_tiles, tiles.and_less(frame), words, x.device)

    return predict


def _finite(denoise: Denoiser, precision: str) -> Denoiser:
    def checked(x: Tensor, level: NoiseLevel) -> Tensor:
        x0 = denoise(x, level)
        if not x0.isfinite().all():
            advice = "" if precision == "fp32" else "; try precision fp32"
            raise NumericalError(
                f"step {level.number + 1}: the latents are not finite, computed in {precision}{advice}"
            )
        return x0

    return checked


class _Branches:
    """The UNet's predictions under one conditioning or two, in float32.

    Args:
        reuse_interval: of noise levels, one in so many has its deep features computed; the others use them.
    """

    def __init__(
        self,
        unet: UNet,
        y: Tensor,
        negative_y: Tensor,
        reuse_interval: int,
        limit: ChunkLimit,
        fps: Tensor | None,
    ):
        self._unet, self._limit, self._fps = unet, limit, fps
        self._device, self._batch = next(unet.parameters()).device, y.shape[0]
        self._y, self._negative_y = y.to(self._device), negative_y.to(self._device)
        self._reuse_interval = reuse_interval
        self._caches: dict[tuple[Origin, int], list[FeatureCache]] = {}  # by place and count of branches

    def conditional(self, x: Tensor, level: NoiseLevel, origin: Origin) -> Tensor:
        """Return the conditional prediction for a part of a video, [B, 4, F, h, w]."""
        return self._predict(x, level, [self._y], self._caches_at(level, origin, 1))

    def both(self, x: Tensor, level: NoiseLevel, origin: Origin) -> Tensor:
        """Return both branches' predictions for a part of a video, [2, B, 4, F, h, w]."""
        contexts = [self._y, self._negative_y]
        small = x[:, 0].numel() <= _TOGETHER.get(self._device.type, 0)
        if small and self._y.shape == self._negative_y.shape:
            contexts = [torch.cat(contexts)]
        return self._predict(x, level, contexts, self._caches_at(level, origin, 2)).unflatten(0, (2, -1))

    def spread_by(self, spread: Spread) -> TileVelocity:
        """Return ``both``, with either branch computed by other processes."""

        def both(x: Tensor, level: NoiseLevel, origin: Origin) -> Tensor:
            mine = spread.rank % 2
            y, cache = (self._y, self._negative_y)[mine], self._caches_at(level, origin, 2)[mine]
            return torch.stack(spread.gather(self._predict(x, level, [y], [cache]))[:2])

        return both

    def _caches_at(self, level: NoiseLevel, origin: Origin, branches: int) -> list[FeatureCache | None]:
        if self._reuse_interval == 1:
            return [None] * branches
        key = (origin, branches)
        if level.number % self._reuse_interval == 0 or key not in self._caches:
            self._caches[key] = [FeatureCache() for _ in range(branches)]
        return [*self._caches[key]]

    def _predict(
        self, x: Tensor, level: NoiseLevel, contexts: list[Tensor], caches: list[FeatureCache | None]
    ) -> Tensor:
        timesteps = torch.full((self._batch,), level.t, device=self._device)

        def predict(y: Tensor, cache: FeatureCache | None) -> Tensor:
            def predict_in_chunks(chunk: int) -> Tensor:
                self._limit.elements = chunk
                v = self._unet(x, timesteps, y, self._fps, cache=cache, chunk=chunk)
                return v.float()

            words = "with layers in parts of {} elements"
            return with_less_at_a_time(predict_in_chunks, self._limit.and_less(), words, self._device)

        return torch.cat([predict(y, cache) for y, cache in zip(contexts, caches)])
