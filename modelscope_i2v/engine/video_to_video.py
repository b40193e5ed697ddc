"""Stage two: a video to a larger, sharper one of the same content."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from typing import Any, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInputError
from ..media.joining import Sound
from ..media.preprocessing import VideoTransform
from ..media.scene_cuts import split_scenes
from ..media.video import DEFAULT_FPS, Timing, Video, open_video
from ..samplers.dpmpp import BrownianNoise, sample_dpmpp_2m_sde
from ..samplers.heun import sample_heun
from ..samplers.schedules import (
    NoiseLevel,
    SolverState,
    dpmpp_2m_sde_levels,
    heun_levels,
    sdedit_schedule,
)
from ..settings.record import first_stage_of, to_metadata
from ..settings.request import Request
from ..settings.stages import VideoToVideoSettings
from .beside import BesideLatents
from .devices import device_of, placed_on
from .enhancement import EnhancedFile, check_rate, enhance, scene_request
from .generated import GeneratedVideo, encoding_of
from .latents import draw_noise, encode_frames, sample_latents
from .memory.limits import check_limits
from .memory.tiles import TileLimit, fitting_tile
from .progress import Progress
from .stage import Stage, replacement


class VideoToVideo(Stage):
    """Stage two: a video, with a text if wanted, to a larger, sharper one.

    Example::

        stage = VideoToVideo.load("path/to/Video-to-Video")
        stage("cat.mp4", text="a cat").save("cat_720p.mp4")

    Attributes:
        negative_y: the embedding [1, 77, width] of the settings' negative prompt.
    """

    name = "video-to-video"
    settings: VideoToVideoSettings

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.schedule = sdedit_schedule()
        self.transform = VideoTransform()
        self._embedded_negative_prompt = self.settings.negative_prompt
        self.negative_y = self.encode_text(self.settings.negative_prompt)

    @property
    def positive_prompt(self) -> str:
        """What is put behind every text: the settings'."""
        return self.settings.positive_prompt

    @positive_prompt.setter
    def positive_prompt(self, prompt: str) -> None:
        self.settings.positive_prompt = prompt

    def forward(self, video: Any, **keywords: Any) -> GeneratedVideo:
        """Generate a sharper video.

        Args:
            video: a path, URL, bytes, or a ``Video``.
            **keywords: ``text``, ``seed``, ``steps``, ``callback`` and the others of a call.

        Raises:
            InvalidInputError, MissingFileError: if the video or a keyword cannot be used.
            Interrupted: if the callback raises StopIteration.
            NotEnoughMemoryError: if it does not fit.
        """
        request, progress = self.resolve(keywords)
        return self.generate(video, request, progress)

    def enhance(
        self, video: Any, output: str | os.PathLike, resume: bool = False, **keywords: Any
    ) -> EnhancedFile:
        """Write a video's sharper one to a file, with its sound and at its rate, whatever its length.

        See ``modelscope_i2v.engine.enhancement.enhance``, which has the arguments and errors.
        """
        with self._one_at_a_time:
            return enhance(self, video, output, resume, **keywords)

    def generate(self, video: Any, request: Request, progress: Progress) -> GeneratedVideo:
        """Generate the sharper video of a video, as of ``forward``."""
        with ExitStack() as stack:
            if isinstance(video, Video):
                tensors = (self.transform(frame[None])[0] for frame in video.frames)
                return self.generate_from_frames(tensors, video.metadata, request, progress, video.fps)
            # One frame too many is enough to refuse the video: the rest need not be read.
            with progress.phase("reading"):
                reader = stack.enter_context(open_video(video, self.settings.limit_frames + 1))
            check_rate(request, reader, video)
            tensors = (self.transform(frame[None])[0] for frame in reader)
            made = self.generate_from_frames(tensors, reader.metadata, request, progress, reader.fps)
            timing = reader.timing() if request.fps == "source" else Timing(1 / Fraction(request.fps))
            sound = Sound(video, reader.start) if request.keep_audio else None
            if request.fps == "source" or sound is not None:
                return replace(made, fps=float(timing.rate), timing=timing, sound=sound)
            return made

    def generate_from_frames(
        self,
        frames: Iterable[Tensor],
        source_metadata: Mapping[str, str],
        request: Request,
        progress: Progress,
        source_fps: float = DEFAULT_FPS,
    ) -> GeneratedVideo:
        """Generate the sharper video of frames, [3, H, W] each in [-1, 1].

        ``source_metadata`` are those of the frames' file: stage one's record is passed on. ``source_fps`` is
        their rate.
        """
        encoding = encoding_of(request)
        with self._one_at_a_time:
            request, frames = self.for_source(request, frames)
            made = []
            for number, scene in enumerate(split_scenes(frames, None, request.scene_cuts, _pixels)):
                beside = BesideLatents()
                latents = self.sample(scene, scene_request(request, number), progress, beside=beside)
                made.append(self.decoded(latents, request, progress, beside))
                request = replace(request, tile_size=beside.tile_size)
            entries = self.record(request, **first_stage_of(source_metadata))
        fps = source_fps if request.fps == "source" else float(request.fps)
        seconds, metadata = progress.seconds, to_metadata(entries)
        pictures = made[0] if len(made) == 1 else np.concatenate(made)
        return GeneratedVideo(pictures, fps, metadata, entries, seconds, encoding=encoding)

    def for_source(self, request: Request, frames: Iterable[Any]) -> tuple[Request, Iterator[Any]]:
        """Return a request with the size and the tiles that a source's frames make, and those frames.

        The UNet then has the request's adapters.

        Raises:
            InvalidInputError: if there are none, or the size is beyond a limit.
        """
        frames = iter(frames)
        first = next(frames, None)
        self._use_adapters(request)
        if first is None:
            raise InvalidInputError("video_data: has no frame")
        sides = first.shape[1:] if isinstance(first, Tensor) else first.shape[:2]
        if request.scale is not None:
            request = request.scaled((sides[1], sides[0]))
            check_limits(self.settings, request)
        if request.tile_size is None:
            device = self.device if self.low_memory else device_of(self.unet)
            tile = fitting_tile(self.settings, request, device, self.low_memory)
            request = replace(request, tile_size=tile)
        return request, chain([first], frames)

    def decoded(
        self, latents: Tensor, request: Request, progress: Progress, beside: BesideLatents, first: int = 0
    ) -> np.ndarray:
        """Return the frames [F, H, W, 3] of latents [1, 4, F, h, w], uint8 or for a deep encoding uint16.

        ``first`` is the number of the first in its scene.
        """
        deep = encoding_of(request).is_deep
        colours = beside.colours
        if colours is not None:
            colours = colours[first : first + latents.shape[2]]
        options = {"in_strips": beside.tile_size is not None, "colours": colours, "deep": deep}
        frames = self.decode(latents, request, progress, to_uint8=True, **options)[0].numpy()
        return frames.astype(np.uint16) if deep else frames

    @torch.no_grad()
    def encode_text(self, text: str) -> Tensor:
        """Return CLIP's hidden states [1, 77, width] of a text."""
        with placed_on(self.clip_encoder, self.device, self.low_memory):
            return self.clip_encoder(text)

    @torch.no_grad()
    def sample(
        self,
        frames: Iterable[Tensor],
        request: Request,
        progress: Progress | None = None,
        y: Tensor | None = None,
        posterior_noise: Tensor | None = None,
        noise: Tensor | None = None,
        entropy: int | None = None,
        beside: BesideLatents | None = None,
    ) -> Tensor:
        """Return the latents [1, 4, F, h, w] of a sharper video.

        Args:
            frames: [3, H, W] each, in [-1, 1], of any size; they are taken one by one.
            request: what to compute.
            progress: what to show of it.
            y: the prompt's embedding [1, 77, width], instead of the request's prompt's.
            posterior_noise: [F, 4, h, w], instead of the seed's.
            noise: [1, 4, F, h, w], instead of the seed's.
            entropy: the Brownian tree's seed, instead of the one drawn from the request's.
            beside: what else comes of it, and where its state is kept.
        """
        progress, beside = progress or Progress(), beside or BesideLatents()
        tiles = TileLimit(request.tile_size, request.tile_overlap)
        # 1. The conditions: the prompt's embedding and the negative prompt's.
        with self._phase("clip", progress, request, request.window, self.clip_encoder):
            y = self.clip_encoder(request.prompt) if y is None else y
            negative_y = self._negative_y(request.negative_prompt)

        layout = dpmpp_2m_sde_levels if request.solver_mode == "fast" else heun_levels
        levels = layout(self.schedule, request.steps, request.total_noise_levels)
        saved = beside.load()
        if saved is None:  # 2. to 4.
            draws = posterior_noise, noise, entropy
            state, entropy = self._noised(frames, request, progress, levels[0], draws, beside)
            beside.save(state, entropy, always=True)
        else:
            state, entropy = saved
            for _ in frames:
                pass  # they are in the state

        # 5. Denoising, guided.
        with self._denoising(progress, request, state.x.shape[2]) as device:
            state = state.to(device)
            denoise = self._denoiser(
                y, negative_y, state.x, levels[state.step], request, progress, tiles, beside.remember
            )
            with progress.steps(self.name, len(levels) - 1, state.step) as after_step:

                def save(after: SolverState) -> None:
                    beside.save(after, entropy, always=after.step == len(levels) - 1)

                if request.solver_mode == "fast":
                    brownian = BrownianNoise(state.x, levels, [entropy])
                    x0 = sample_dpmpp_2m_sde(denoise, state, levels, brownian, after_step, save)
                else:
                    x0 = sample_heun(denoise, state, levels, after_step, save)
        beside.tile_size = tiles.size
        return x0

    def _noised(
        self,
        frames: Iterable[Tensor],
        request: Request,
        progress: Progress,
        level: NoiseLevel,
        draws: tuple[Tensor | None, Tensor | None, int | None],
        beside: BesideLatents,
    ) -> tuple[SolverState, int]:
        """Return the sampler's first state, of a video's latents and noise, and the Brownian tree's seed.

        ``draws`` are those of ``sample``'s arguments.
        """
        # 2. The video's posterior, frame by frame.
        _, channels, _, height, width = self._latent_shape(request, 1)
        with self._phase("encoding", progress, request, request.window, self.autoencoder):
            frames = self._within_limit(frames, request)
            in_strips, seen = request.tile_size is not None, beside.colours_seen(request)
            posterior = encode_frames(
                self.autoencoder, frames, request.size, (height, width), in_strips, seen
            )

        # 3. The seed's draws.
        count = len(posterior.mean)
        shape = self._latent_shape(request, count)
        generator = torch.Generator().manual_seed(request.seed)
        drawn = draw_noise(generator, (count, channels, height, width))
        posterior_noise = replacement("posterior_noise", draws[0], drawn)
        noise = replacement("noise", draws[1], draw_noise(generator, shape))
        drawn_entropy = int(torch.randint(2**63 - 1, (1,), generator=generator))
        entropy = drawn_entropy if draws[2] is None else int(draws[2])

        # 4. Noise on the video's latents (SDEdit).
        x0 = sample_latents(posterior, posterior_noise)
        noised = self.schedule.add_noise(x0, noise.to(x0.device), request.total_noise_levels - 1)
        # Variance-exploding would be x / alpha; the published sampling multiplies by s = sigma / alpha.
        return SolverState(0, noised * level.s), entropy

    def _within_limit(self, frames: Iterable[Tensor], request: Request) -> Iterator[Tensor]:
        """Pass frames on, up to the settings' limit."""
        count = 0
        for count, frame in enumerate(frames, start=1):
            if count > self.settings.limit_frames:
                check_limits(self.settings, request, count)
            yield frame
        if not count:
            raise InvalidInputError("video_data: has no frame")

    def _negative_y(self, negative_prompt: str) -> Tensor:
        if negative_prompt == self._embedded_negative_prompt:
            return self.negative_y
        return self.clip_encoder(negative_prompt)


def _pixels(frame: Tensor) -> np.ndarray:
    """A frame [3, H, W] in [-1, 1] as uint8 [H, W, 3]."""
    return ((frame.permute(1, 2, 0) + 1) * 127.5).to(torch.uint8).numpy()
