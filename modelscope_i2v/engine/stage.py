"""A stage of I2VGen-XL on a device: its settings and networks, and what both stages do alike."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Iterator, Mapping, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError
from ..models.attention import select_attention
from ..models.autoencoder import Autoencoder
from ..models.layers import in_channels_last
from ..models.unet import UNet
from ..samplers.schedules import Denoiser, NoiseLevel
from ..settings.configuration import load_settings
from ..settings.keywords import check_keywords
from ..settings.record import configuration_sha256, record
from ..settings.request import Request
from ..settings.stages import StageSettings
from ..weights import load_weights
from ..weights.adapters import MergedAdapters, check_adapter, file_sha256, find_adapter
from ..weights.loading import precision_name
from ..weights.parts import stage_parts
from .compilation import CompiledBlocks
from .denoising import ChunkLimit, WindowWrapper, guided_denoiser
from .devices import device_of, placed_on, resolve_device
from .latent_colours import LatentColours
from .latents import decode_latents, latent_size
from .memory.estimate import choose_low_memory, chunk_of
from .memory.limits import check_limits
from .memory.out_of_memory import OutOfMemory, is_out_of_memory, not_enough
from .memory.tiles import TileLimit
from .precision import select_dtype
from .progress import Progress
from .spreading import Spread

AnyStage = TypeVar("AnyStage", bound="Stage")


class Stage(nn.Module):
    """One of the two stages, loaded from a model folder.

    Attributes:
        settings: may be changed between calls.
        unet, autoencoder, clip_encoder: the networks.
        schedule: the noise levels.
        transform: from pictures to what the stage takes.
        spread: the processes that share each call, all of which make it; by default this one alone.
        device: where the stage was loaded. What is computed follows the networks, wherever they were moved.
    """

    name: ClassVar[str]
    settings: StageSettings
    unet: UNet
    autoencoder: Autoencoder
    clip_encoder: nn.Module

    def __init__(self, folder: str | Path, settings: StageSettings, device: torch.device):
        super().__init__()
        self.folder, self.settings = Path(folder), settings
        # Now, while the file is what the settings were read from: later it may be edited, or gone.
        self.configuration_sha256 = configuration_sha256(folder)
        self._device = device
        self._dtype = select_dtype(settings.precision, device)
        self.low_memory = choose_low_memory(settings, device)
        home = torch.device("cpu") if self.low_memory else device
        for name, part in stage_parts(settings, folder, select_attention(settings.attention, device)).items():
            load_weights(
                part.weights,
                part.path,
                prefix=part.prefix,
                ignore=part.ignored,
                device=home,
                dtype=self._dtype,
                layout=in_channels_last,
            )
            setattr(self, name, part.network)
        self._chunk_limit = ChunkLimit(0)
        self._chunked_for: torch.device | None = None
        self._compiled = CompiledBlocks(self.unet) if settings.compile else None
        self._one_at_a_time = threading.RLock()
        self.spread = Spread()
        self._adapters = MergedAdapters(self.unet, self.name)
        self.eval().requires_grad_(False)
        if settings.lora:
            self._use_adapters(Request.resolve(settings))

    @classmethod
    def load(
        cls: type[AnyStage], folder: str | Path, device: str | torch.device | None = None, **settings: Any
    ) -> AnyStage:
        """Load the stage of a model folder.

        Args:
            folder: holds ``configuration.json`` and the weights.
            device: such as ``cpu`` or ``cuda:0``; by default a GPU where there is one.
            **settings: take precedence over those of the file.

        Raises:
            ConfigurationError, MissingFileError, CheckpointError, NotEnoughMemoryError: if it cannot be.
        """
        return cls(folder, load_settings(folder, cls.name, settings), resolve_device(device))

    @property
    def device(self) -> torch.device:
        return self._device

    @device.setter
    def device(self, device: str | torch.device) -> None:
        self._device = resolve_device(device)

    def share_autoencoder(self, other: Stage) -> None:
        """Use the other stage's autoencoder instead of a copy, if it is the same to the last weight."""
        ours, theirs = self.autoencoder.state_dict(), other.autoencoder.state_dict()
        same = self.settings.autoencoder == other.settings.autoencoder and self._dtype == other._dtype
        if same and all(torch.equal(ours[name], theirs[name].to(ours[name].device)) for name in ours):
            self.autoencoder = other.autoencoder

    def resolve(self, keywords: Mapping[str, Any]) -> tuple[Request, Progress]:
        """Return what the keywords of a call ask for, and what shows its progress.

        ``progress`` may be a ``Progress`` of the caller's, which then has its own callback.

        Raises:
            InvalidInputError: for a keyword that is unknown, not allowed or beyond a limit.
            MissingFileError, CheckpointError: for an adapter that is not there or does not fit.
        """
        watched = keywords.get("progress")
        if isinstance(watched, Progress):
            keywords = {**keywords, "progress": None}
        checked = check_keywords(self.name, keywords)
        progress = Progress(checked.pop("callback", None), checked.pop("progress", None))
        progress = watched if isinstance(watched, Progress) else progress
        request = Request.resolve(self.settings, checked)
        request = replace(request, seed=self.spread.same(request.seed))
        check_limits(self.settings, request)
        for path in request.lora:
            check_adapter(find_adapter(path, self.folder), self.unet, self.name)
        return request, progress

    def decode(
        self,
        latents: Tensor,
        request: Request,
        progress: Progress | None = None,
        to_uint8: bool = False,
        **options: Any,
    ) -> Tensor:
        """Return the videos of latents [B, 4, F, h, w], as of ``decode_latents``, which has the options."""
        progress = progress or Progress()
        at_a_time = 1 if self.low_memory else self.settings.decoder_bs
        with self._phase("decoding", progress, request, latents.shape[2], self.autoencoder) as device:
            latents, colours = latents.to(device), options.pop("colours", None)

            def decode(first: int, last: int) -> Tensor:
                some = None if colours is None else colours[first:last]
                return decode_latents(
                    self.autoencoder, latents[:, :, first:last], request.size, at_a_time, to_uint8,
                    colours=some, **options,
                )  # fmt: skip

            return self.spread.frames(decode, latents.shape[2], 1 if to_uint8 else 2)

    def record(self, request: Request, **more: Any) -> dict[str, Any]:
        """Return how a video of a request is made; ``more`` goes into it."""
        precision = precision_name(self.unet.dtype)
        entries = {**record(request, self.folder, self.configuration_sha256, precision), **more}
        if request.lora:
            entries["lora_sha256"] = [file_sha256(find_adapter(path, self.folder)) for path in request.lora]
        return entries

    def _use_adapters(self, request: Request) -> None:
        """Give the UNet a request's adapters, and take others out."""
        if self._adapters.network is not self.unet:  # somebody has assigned another, and may assign it back
            self._adapters.remove()
            self._adapters = MergedAdapters(self.unet, self.name)
        paths = [find_adapter(path, self.folder) for path in request.lora]
        self._adapters.use(list(zip(paths, request.lora_scale)))

    @contextmanager
    def _denoising(self, progress: Progress, request: Request, frames: int) -> Iterator[torch.device]:
        """Time the denoising, in which the UNet has the request's adapters and no other call's."""
        with self._one_at_a_time:
            self._use_adapters(request)
            with self._phase("denoising", progress, request, frames, self.unet) as device:
                yield device

    @contextmanager
    def _phase(
        self, name: str, progress: Progress, request: Request, frames: int, network: nn.Module
    ) -> Iterator[torch.device]:
        """Time a phase of a generation, with its network where it works; out of memory, raise what helps."""
        device = self.device if self.low_memory else device_of(network)
        try:
            with progress.phase(name, device), placed_on(network, device, self.low_memory):
                yield device
        except (OutOfMemory, MemoryError, RuntimeError) as error:
            if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
                raise
            raise not_enough(self.settings, request, frames, name, device, self.low_memory) from error

    def _denoiser(
        self,
        y: Tensor,
        negative_y: Tensor,
        x: Tensor,
        level: NoiseLevel,
        request: Request,
        progress: Progress,
        tiles: TileLimit | None = None,
        remember: WindowWrapper = lambda velocity: velocity,
        fps: Tensor | None = None,
    ) -> Denoiser:
        """Return what the samplers call, compiled for a state like x at a level like its."""
        device = device_of(self.unet)
        if device != self._chunked_for:  # else as it is: out of memory, it has become less
            self._chunk_limit, self._chunked_for = ChunkLimit(chunk_of(device, self.low_memory)), device

        def denoiser_for(request: Request, remember: WindowWrapper = lambda velocity: velocity) -> Denoiser:
            scale = self.settings.autoencoder.downscale
            return guided_denoiser(
                self.unet, y, negative_y, request, self._chunk_limit, tiles, scale, remember, fps, self.spread
            )

        if self.spread.count > 1:
            self.spread.check_same(self.name, request, y.cpu(), x.cpu())

        if self._compiled is not None:
            whole = replace(request, guidance_interval=None, reuse_interval=1)
            sizes = [denoiser_for(whole)]
            if request.guidance_interval is not None:  # there are calls of one branch, too
                sizes.append(denoiser_for(replace(whole, guide_scale=1.0)))
            with progress.phase("compiling", device):
                self._compiled.prepare(sizes, x, level)
        denoise = denoiser_for(request, remember)

        def watched(x: Tensor, level: NoiseLevel) -> Tensor:
            progress.estimate = denoise(x, level)
            return progress.estimate

        return watched

    def fit_latent_colours(self) -> LatentColours:
        """Return the map from latents to colours that fits the autoencoder."""
        with self._one_at_a_time, placed_on(self.autoencoder, self.device, self.low_memory):
            return LatentColours.fit(self.autoencoder)

    def _latent_shape(self, request: Request, frames: int) -> tuple[int, ...]:
        size = latent_size(request.size, self.settings.unet, self.settings.autoencoder.downscale)
        return (1, self.settings.autoencoder.embed_dim, frames, *size)


def replacement(name: str, value: Tensor | None, drawn: Tensor) -> Tensor:
    """Return the draw that a caller gives instead of the seed's, if any.

    Raises:
        InvalidInputError: if it is not of the same shape.
    """
    if value is None:
        return drawn
    if not isinstance(value, Tensor) or value.shape != drawn.shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InvalidInputError(f"{name}: must be {list(drawn.shape)}, got {got}")
    return value
