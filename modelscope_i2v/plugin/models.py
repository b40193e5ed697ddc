"""ModelScope's models of the two tasks: they put networks, samplers and settings together."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, ContextManager, Iterator, Mapping

import torch
from modelscope.models.base import TorchModel
from modelscope.models.builder import MODELS
from modelscope.utils.device import create_device
from modelscope.utils.logger import get_logger
from torch import Tensor, nn

from ..engine.compilation import CompiledBlocks
from ..engine.denoising import guided_velocity
from ..engine.latents import decode_video, draw_noise, encode_video, latent_size
from ..engine.memory.estimate import chunk_of
from ..engine.memory.out_of_memory import OutOfMemory, is_out_of_memory, not_enough
from ..engine.memory.residency import at_work, choose_low_memory, device_of
from ..engine.precision import select_dtype
from ..engine.progress import PhaseClock, stepping
from ..errors import InvalidInputError
from ..media.preprocessing import ClipImageTransform, VideoTransform
from ..models.attention import select_attention
from ..models.layers import in_channels_last
from ..samplers.ddim import DDIMSchedule, sample_ddim
from ..samplers.dpmpp import karras_timesteps, sample_dpmpp_2m
from ..samplers.sdedit import (
    BrownianNoise,
    SDEditSchedule,
    dpmpp_2m_sde_levels,
    heun_levels,
    published_sigmas,
    sample_dpmpp_2m_sde,
    sample_heun,
)
from ..samplers.velocity import Velocity
from ..settings.configuration import SETTINGS_OF_STAGE, StageSettings, load_settings
from ..settings.record import configuration_sha256
from ..settings.request import Request, StepCallback
from ..weights import load_weights
from ..weights.parts import stage_parts
from .registration import (
    IMAGE_TO_VIDEO,
    IMAGE_TO_VIDEO_MODEL,
    VIDEO_TO_VIDEO,
    VIDEO_TO_VIDEO_MODEL,
    register_class,
)

logger = get_logger()


class StageModel(TorchModel):
    """What both stages' models have in common.

    Attributes:
        generator: the UNet.
        autoencoder: the KL autoencoder.
        clip_encoder: the CLIP tower that the stage needs.
        diffusion: the noise schedule.
        vid_trans: from pictures to what the model takes.
        cfg: the settings, which may be changed between calls.
        device: where the model was loaded. What is computed follows the parts, wherever they were moved.
    """

    stage: ClassVar[str]

    def __init__(self, model_dir: str, *args: Any, **kwargs: Any):
        """Load a stage.

        Args:
            model_dir: the model folder.
            **kwargs: ``device`` as ModelScope names it, and settings that go before the file's.
        """
        super().__init__(model_dir, *args, **kwargs)
        names = SETTINGS_OF_STAGE[self.stage].names()
        overrides = {name: kwargs[name] for name in names if name in kwargs}
        self.cfg: StageSettings = load_settings(model_dir, self.stage, overrides)
        # Now, of the file that is in force: later it may be edited, or gone.
        self.configuration_sha256 = configuration_sha256(model_dir)
        self.device = create_device(kwargs.get("device") or "gpu")
        self.dtype = select_dtype(self.cfg.precision, self.device)

        self.low_memory = choose_low_memory(self.cfg, self.device)
        home = torch.device("cpu") if self.low_memory else self.device
        attend = select_attention(self.cfg.attention, self.device)
        for name, part in stage_parts(self.cfg, model_dir, attend).items():
            load_weights(
                part.weights,
                part.path,
                prefix=part.prefix,
                ignore=part.ignored,
                device=home,
                dtype=self.dtype,
                layout=in_channels_last,
            )
            setattr(self, name, part.network)
            logger.info("loaded %s", part.path)
        self._chunked_for: torch.device | None = None
        self._compiled = CompiledBlocks(self.generator) if self.cfg.compile else None
        self.eval().requires_grad_(False)

    def share_autoencoder(self, other: StageModel) -> None:
        """Use the other stage's autoencoder, if it is the same to the last weight, instead of a copy."""
        ours, theirs = self.autoencoder.state_dict(), other.autoencoder.state_dict()
        same = self.cfg.autoencoder == other.cfg.autoencoder and self.dtype == other.dtype
        if same and all(torch.equal(ours[name], theirs[name].to(ours[name].device)) for name in ours):
            self.autoencoder = other.autoencoder

    def _at_work(self, network: nn.Module) -> ContextManager[torch.device]:
        return at_work(network, self.device, self.low_memory)

    @contextmanager
    def _phase(self, name: str, clock: PhaseClock, request: Request, frames: int) -> Iterator[None]:
        """A part of a generation of so many frames: timed; out of memory, with an error that helps."""
        try:
            with clock.phase(name, self.device):
                yield
        except (OutOfMemory, MemoryError, RuntimeError) as error:
            if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
                raise
            raise not_enough(self.cfg, request, frames, name, self.device, self.low_memory) from error

    def _velocity(
        self, y: Tensor, negative_y: Tensor, x: Tensor, request: Request, clock: PhaseClock, **told: Tensor
    ) -> Velocity:
        """What the samplers integrate, for a state like x."""
        device = device_of(self.generator)
        if device != self._chunked_for:  # else as it is: out of memory, it has become less
            self.generator.chunk, self._chunked_for = chunk_of(device, self.low_memory), device

        def of(request: Request) -> Velocity:
            return guided_velocity(self.generator, y, negative_y, request, **told)

        if self._compiled is not None:
            whole = replace(request, guidance_interval=None, reuse_interval=1)
            sizes = [of(whole)]
            if request.guidance_interval is not None:  # there are calls of one branch, too
                sizes.append(of(replace(whole, guide_scale=1.0)))
            with clock.phase("compiling", self.device):
                self._compiled.prepare(sizes, x)
        return of(request)

    def _latent_shape(self, request: Request, frames: int) -> tuple[int, ...]:
        size = latent_size(request.size, self.cfg.unet, self.cfg.autoencoder.downscale)
        return (1, self.cfg.autoencoder.embed_dim, frames, *size)

    def _decode(self, latents: Tensor, request: Request, clock: PhaseClock) -> Tensor:
        frames = latents.shape[2]
        at_a_time = 1 if self.low_memory else self.cfg.decoder_bs
        with self._phase("decoding", clock, request, frames), self._at_work(self.autoencoder) as device:
            return decode_video(self.autoencoder, latents.to(device), request.size, at_a_time)


@register_class(MODELS, IMAGE_TO_VIDEO, VIDEO_TO_VIDEO_MODEL)
@register_class(MODELS, IMAGE_TO_VIDEO, IMAGE_TO_VIDEO_MODEL)
class ImageToVideoModel(StageModel):
    """Stage one: a video whose content is an image's."""

    stage = IMAGE_TO_VIDEO

    def __init__(self, model_dir: str, *args: Any, **kwargs: Any):
        super().__init__(model_dir, *args, **kwargs)
        self.diffusion = DDIMSchedule()
        self.vid_trans = ClipImageTransform(self.cfg.clip.image_size)

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Any], clock: PhaseClock | None = None) -> Tensor:
        """Generate a video for each image.

        Args:
            inputs: ``vit_frame`` [B, 3, 224, 224]; optional: ``request`` (else the settings' own) and
                ``noise``, the initial latent [B, 4, F, h, w], instead of the seed's.

        Returns:
            [B, 3, F, H, W] in about [-1, 1], float32 on the CPU.
        """
        request = inputs.get("request") or Request.resolve(self.cfg)
        clock = clock or PhaseClock()
        images = _required(inputs, "vit_frame")
        batch = images.shape[0]
        frames = request.frames
        with self._phase("clip", clock, request, frames), self._at_work(self.clip_encoder):
            y = self.clip_encoder(images)[:, None]
        seeded = torch.Generator().manual_seed(request.seed)
        noise = draw_noise(seeded, self._latent_shape(request, frames), request.noise_strength)
        # Each image of a batch gets what it would get on its own.
        noise = _given(inputs, "noise", noise.expand(batch, -1, -1, -1, -1))
        if request.solver == "dpmpp":
            sample, timesteps = sample_dpmpp_2m, karras_timesteps(self.diffusion, request.steps)
        else:
            sample, timesteps = sample_ddim, self.diffusion.timesteps(request.steps)
        with self._phase("denoising", clock, request, frames), self._at_work(self.generator) as device:
            noise = noise.to(device)
            fps = torch.full((batch,), request.fps, device=device)
            velocity = self._velocity(y, torch.zeros_like(y), noise, request, clock, fps=fps)
            with stepping(request, len(timesteps)) as stepped:
                latents = sample(velocity, noise, self.diffusion, timesteps, stepped)
        return self._decode(latents, request, clock)


@register_class(MODELS, VIDEO_TO_VIDEO, IMAGE_TO_VIDEO_MODEL)
@register_class(MODELS, VIDEO_TO_VIDEO, VIDEO_TO_VIDEO_MODEL)
class VideoToVideoModel(StageModel):
    """Stage two: a larger, sharper video of a video's content.

    ``negative_y`` is the negative prompt's embedding [1, 77, width].
    """

    stage = VIDEO_TO_VIDEO

    def __init__(self, model_dir: str, *args: Any, **kwargs: Any):
        super().__init__(model_dir, *args, **kwargs)
        self.diffusion = SDEditSchedule(published_sigmas())
        self.vid_trans = VideoTransform()
        self._embedded_negative_prompt = self.cfg.negative_prompt
        self.negative_y = self.encode_text(self.cfg.negative_prompt)

    @property
    def positive_prompt(self) -> str:
        """What is put behind every text; the same as ``cfg.positive_prompt``."""
        return self.cfg.positive_prompt

    @positive_prompt.setter
    def positive_prompt(self, prompt: str) -> None:
        self.cfg.positive_prompt = prompt

    @torch.no_grad()
    def encode_text(self, text: str) -> Tensor:
        """CLIP's hidden states [1, 77, width] of a text."""
        with self._at_work(self.clip_encoder):
            return self.clip_encoder(text)

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Any], clock: PhaseClock | None = None) -> Tensor:
        """Generate a sharper video of a video.

        Args:
            inputs: ``video_data`` [F, 3, H, W] in [-1, 1], of any size; optional: ``y`` [1, 77, width], the
                prompt's embedding (else the request's prompt is embedded), ``request`` (else the settings'
                own), and instead of the seed's draws ``posterior_noise`` [F, 4, h, w], ``noise``
                [1, 4, F, h, w] and ``entropy``, the Brownian tree's seed.

        Returns:
            [1, 3, F, H', W'] in about [-1, 1], float32 on the CPU.
        """
        request = inputs.get("request") or Request.resolve(self.cfg)
        clock = clock or PhaseClock()
        frames = _required(inputs, "video_data")
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise InvalidInputError(f"video_data: must be [F, 3, H, W], got {list(frames.shape)}")
        request.check_limits(self.cfg, frames.shape[0])
        with self._phase("clip", clock, request, len(frames)):
            y = inputs["y"] if inputs.get("y") is not None else self.encode_text(request.prompt)
            negative_y = self._negative_y(request)

        shape = self._latent_shape(request, frames.shape[0])
        posterior_noise, noise, entropy = self._draws(inputs, request.seed, shape)
        with self._phase("encoding", clock, request, len(frames)), self._at_work(self.autoencoder):
            latents = encode_video(self.autoencoder, frames, request.size, shape[3:], posterior_noise)
        layout = dpmpp_2m_sde_levels if request.solver_mode == "fast" else heun_levels
        levels = layout(self.diffusion, request.steps, request.total_noise_levels)
        with self._phase("denoising", clock, request, len(frames)), self._at_work(self.generator) as device:
            noise_level = request.total_noise_levels - 1
            noised = self.diffusion.noise(latents.to(device), noise.to(device), noise_level)
            velocity = self._velocity(y, negative_y, noised, request, clock)
            with stepping(request, len(levels) - 1) as stepped:
                latents = self._sample(velocity, noised, levels, entropy, request, stepped)
        return self._decode(latents, request, clock)

    def _sample(
        self,
        velocity: Velocity,
        noised: Tensor,
        levels: Tensor,
        entropy: int,
        request: Request,
        stepped: StepCallback,
    ) -> Tensor:
        denoise = self.diffusion.denoiser(velocity)
        # Variance-exploding would be x / alpha; the published sampling multiplies by s = sigma / alpha.
        x = noised * levels[0].item()
        if request.solver_mode == "fast":
            noise = BrownianNoise(x, levels, [entropy])
            return sample_dpmpp_2m_sde(denoise, x, levels, noise, stepped)
        return sample_heun(denoise, x, levels, stepped)

    @staticmethod
    def _draws(inputs: Mapping[str, Any], seed: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
        """Posterior noise [F, 4, h, w], noise [1, 4, F, h, w] and entropy: given, or else the seed's."""
        seeded = torch.Generator().manual_seed(seed)
        posterior_noise = draw_noise(seeded, (shape[2], shape[1], *shape[3:]))
        noise = draw_noise(seeded, shape)
        entropy = int(torch.randint(2**63 - 1, (1,), generator=seeded))
        return (
            _given(inputs, "posterior_noise", posterior_noise),
            _given(inputs, "noise", noise),
            int(inputs.get("entropy", entropy)),
        )

    def _negative_y(self, request: Request) -> Tensor:
        if request.negative_prompt == self._embedded_negative_prompt:
            return self.negative_y
        return self.encode_text(request.negative_prompt)


def _required(inputs: Mapping[str, Any], name: str) -> Tensor:
    if not isinstance(inputs.get(name), Tensor):
        raise InvalidInputError(f"{name}: a tensor is needed, got {type(inputs.get(name)).__name__}")
    return inputs[name]


def _given(inputs: Mapping[str, Any], name: str, drawn: Tensor) -> Tensor:
    """A random draw, or what the caller gives instead of it, which must be of its shape."""
    value = inputs.get(name)
    if value is None:
        return drawn
    if not isinstance(value, Tensor) or value.shape != drawn.shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InvalidInputError(f"{name}: must be {list(drawn.shape)}, got {got}")
    return value.float()
