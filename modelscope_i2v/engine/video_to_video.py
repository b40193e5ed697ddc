"""Stage two: a video to a larger, sharper one of the same content."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInputError
from ..media.preprocessing import VideoTransform
from ..media.video import Video, open_video
from ..samplers.dpmpp import BrownianNoise, sample_dpmpp_2m_sde
from ..samplers.heun import sample_heun
from ..samplers.schedules import dpmpp_2m_sde_levels, heun_levels, sdedit_schedule
from ..settings.record import FIRST_STAGE, from_metadata
from ..settings.request import Request
from ..settings.stages import VideoToVideoSettings
from .devices import placed_on
from .generated import GeneratedVideo
from .latents import draw_noise, encode_frames, sample_latents
from .memory.limits import check_limits
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

    def generate(self, video: Any, request: Request, progress: Progress) -> GeneratedVideo:
        """Generate the sharper video of a video, as of ``forward``."""
        with ExitStack() as stack:
            frames: Iterable[np.ndarray]
            if isinstance(video, Video):
                frames, metadata = video.frames, video.metadata
            else:
                # One frame too many is enough to refuse the video: the rest need not be read.
                with progress.phase("reading"):
                    reader = stack.enter_context(open_video(video, self.settings.limit_frames + 1))
                frames, metadata = reader, reader.metadata
            tensors = (self.transform(frame[None])[0] for frame in frames)
            return self.generate_from_frames(tensors, metadata, request, progress)

    def generate_from_frames(
        self,
        frames: Iterable[Tensor],
        source_metadata: Mapping[str, str],
        request: Request,
        progress: Progress,
    ) -> GeneratedVideo:
        """Generate the sharper video of frames, [3, H, W] each in [-1, 1].

        ``source_metadata`` are those of the frames' file: stage one's record is passed on.
        """
        first_stage = from_metadata(source_metadata)
        more = {FIRST_STAGE: first_stage} if first_stage.get("stage") == "image-to-video" else {}
        with self._one_at_a_time:
            return self._generated(self.sample(frames, request, progress), request, progress, **more)

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
        """
        progress = progress or Progress()
        _, _, _, height, width = self._latent_shape(request, 1)

        # 1. The conditions: the prompt's embedding and the negative prompt's.
        with self._phase("clip", progress, request, request.window, self.clip_encoder):
            y = self.clip_encoder(request.prompt) if y is None else y
            negative_y = self._negative_y(request.negative_prompt)

        # 2. The video's posterior, frame by frame.
        with self._phase("encoding", progress, request, request.window, self.autoencoder):
            frames = self._within_limit(frames, request)
            posterior = encode_frames(self.autoencoder, frames, request.size, (height, width))

        # 3. The seed's draws.
        count = len(posterior.mean)
        shape = self._latent_shape(request, count)
        generator = torch.Generator().manual_seed(request.seed)
        drawn = draw_noise(generator, (count, shape[1], *shape[3:]))
        posterior_noise = replacement("posterior_noise", posterior_noise, drawn)
        noise = replacement("noise", noise, draw_noise(generator, shape))
        drawn_entropy = int(torch.randint(2**63 - 1, (1,), generator=generator))
        entropy = drawn_entropy if entropy is None else int(entropy)

        # 4. Noise on the video's latents (SDEdit).
        x0 = sample_latents(posterior, posterior_noise)
        layout = dpmpp_2m_sde_levels if request.solver_mode == "fast" else heun_levels
        levels = layout(self.schedule, request.steps, request.total_noise_levels)

        # 5. Denoising, guided.
        with self._denoising(progress, request, count) as device:
            noised = self.schedule.add_noise(x0.to(device), noise.to(device), request.total_noise_levels - 1)
            denoise = self._denoiser(y, negative_y, noised, levels[0], request, progress)
            # Variance-exploding would be x / alpha; the published sampling multiplies by s = sigma / alpha.
            x = noised * levels[0].s
            with progress.steps(self.name, len(levels) - 1) as after_step:
                if request.solver_mode == "fast":
                    brownian = BrownianNoise(x, levels, [entropy])
                    return sample_dpmpp_2m_sde(denoise, x, levels, brownian, after_step)
                return sample_heun(denoise, x, levels, after_step)

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
