"""Stage one: an image to a video of its content."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..media.images import open_image
from ..media.preprocessing import ClipImageTransform
from ..samplers.ddim import sample_ddim
from ..samplers.dpmpp import sample_dpmpp_2m
from ..samplers.schedules import ddim_levels, karras_levels, stable_diffusion_schedule
from ..settings.record import to_metadata
from ..settings.request import Request
from .generated import GeneratedVideo
from .latents import draw_noise
from .progress import Progress
from .stage import Stage, replacement


class ImageToVideo(Stage):
    """Stage one: an image to a video of its content.

    Example::

        stage = ImageToVideo.load("path/to/Image-to-Video")
        stage("cat.jpg", seed=7).save("cat.mp4")
    """

    name = "image-to-video"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.schedule = stable_diffusion_schedule()
        self.transform = ClipImageTransform(self.settings.clip.image_size)

    def forward(self, image: Any, **keywords: Any) -> GeneratedVideo:
        """Generate a video.

        Args:
            image: a path, URL, bytes, PIL image or BGR array.
            **keywords: ``seed``, ``steps``, ``callback`` and the others of a call.

        Raises:
            InvalidInputError, MissingFileError: if the image or a keyword cannot be used.
            Interrupted: if the callback raises StopIteration.
            NotEnoughMemoryError: if it does not fit.
        """
        request, progress = self.resolve(keywords)
        with progress.phase("reading"):
            pixels = self.transform(open_image(image))[None]
        return self.generate(pixels, request, progress)

    def generate(self, pixels: Tensor, request: Request, progress: Progress) -> GeneratedVideo:
        """Generate the video of a transformed image [1, 3, size, size]."""
        with self._one_at_a_time:
            latents = self.sample(pixels, request, progress)
            frames = self.decode(latents, request, progress, to_uint8=True)[0].numpy()
            entries = self.record(request)
        return GeneratedVideo(frames, entries["fps"], to_metadata(entries), entries, progress.seconds)

    @torch.no_grad()
    def sample(
        self,
        pixels: Tensor,
        request: Request,
        progress: Progress | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return the latents [B, 4, F, h, w] of videos of images.

        Args:
            pixels: transformed images [B, 3, size, size]; each gives what it would give alone.
            request: what to compute.
            progress: what to show of it.
            noise: the initial latents [B, 4, F, h, w], instead of the seed's.
        """
        progress = progress or Progress()
        batch, frames = pixels.shape[0], request.frames

        # 1. The condition: the image's embedding; the unconditional one is zero.
        with self._phase("clip", progress, request, frames, self.clip_encoder):
            y = self.clip_encoder(pixels)[:, None]

        # 2. The initial noise, with some offset for each frame.
        generator = torch.Generator().manual_seed(request.seed)
        drawn = draw_noise(generator, self._latent_shape(request, frames), request.noise_strength)
        noise = replacement("noise", noise, drawn.expand(batch, -1, -1, -1, -1))

        # 3. The noise levels: DDIM's, or fewer of an approximate solver.
        if request.solver == "dpmpp":
            sample, levels = sample_dpmpp_2m, karras_levels(self.schedule, request.steps)
        else:
            sample, levels = sample_ddim, ddim_levels(self.schedule, request.steps)

        # 4. Denoising, guided.
        with self._denoising(progress, request, frames) as device:
            noise = noise.to(device)
            fps = torch.full((batch,), int(request.fps), device=device)
            denoise = self._denoiser(y, torch.zeros_like(y), noise, levels[0], request, progress, fps=fps)
            with progress.steps(self.name, len(levels) - 1) as after_step:
                return sample(denoise, noise, levels, after_step)
