"""One stage of this package, by its public calls, and what it has in common with the stock's."""

from __future__ import annotations

import io
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, Callable, ContextManager
from unittest.mock import patch

import numpy as np
import torch
from einops import rearrange
from modelscope.pipelines import pipeline
from PIL import Image
from torch import Tensor, nn
from torch.utils.benchmark import timer

import modelscope_i2v.plugin.pipelines  # noqa: F401  now, so that imports are not part of loading

from .cases import TASKS, Case
from .measuring import Enough

SCALE_FACTOR = 0.18215  # from the autoencoder's latents to the diffusion's


class Side:
    """A stage's networks, and what is measured of them.

    ``generator``, ``autoencoder`` and ``clip_encoder`` are as ``pipe.model`` has them.
    """

    case: Case
    device: torch.device
    precision: str
    generator: nn.Module
    autoencoder: nn.Module
    clip_encoder: nn.Module

    def weights_bytes(self) -> int:
        """What the loaded networks hold."""
        modules = (self.generator, self.autoencoder, self.clip_encoder)
        return sum(value.nbytes for module in modules for value in module.state_dict().values())

    def autocast(self) -> ContextManager:
        """What the side computes in beyond its weights' precision."""
        return nullcontext()

    def conditioning(self, y: Tensor) -> dict[str, Tensor]:
        """The UNet's keywords."""
        fps = torch.tensor([self.case.settings.target_fps], device=self.device)
        return {"y": y.to(self.device), **({"fps": fps} if self.case.stage == 1 else {})}

    @torch.no_grad()
    def velocity(self) -> Tensor:
        """The UNet's prediction [1, 4, F, h, w] for the case's noise at timestep 500."""
        x, t = self.case.noise.to(self.device), torch.tensor([500], device=self.device)
        with self.autocast():
            return self.generator(x, t, **self.conditioning(self.case.y))

    @torch.no_grad()
    def encode(self) -> Tensor:
        """The posterior means [F, 4, h, w] of the case's frames, one frame at a time."""
        frames = self.case.frames.split(1)
        return torch.cat([self.autoencoder.encode(frame.to(self.device)).mean for frame in frames])

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The frames [F, 3, H, W] of the case's latents, ``decoder_bs`` at a time."""
        latents = rearrange(self.case.latents, "1 z f h w -> f z h w").to(self.device) / SCALE_FACTOR
        with self.autocast() if self.case.stage == 2 else nullcontext():
            parts = [self.autoencoder.decode(each) for each in latents.split(self.case.settings.decoder_bs)]
        return torch.cat(parts).float()

    def generate(self, steps: int, **settings: Any) -> Tensor:
        """The whole stage: a video [1, 3, F, H, W]; ``settings`` as in ``configuration.json``."""
        raise NotImplementedError

    def marks(self, mark: Callable[[], Any] = timer) -> list[Any]:
        """What ``mark`` returns after the first and after the second step of a guided generation."""
        raise NotImplementedError

    def step_seconds(self) -> float:
        first, second = self.marks()
        return second - first


class Ours(Side):
    """One stage of a pipeline of this package."""

    def __init__(self, folder: Path, case: Case, device: torch.device, precision: str, compile: bool = False):
        self.case, self.device = case, device
        # Left to itself, a small GPU would have the networks take turns on it.
        options = {"precision": precision, "low_memory": False, "compile": compile}
        self.pipe = pipeline(TASKS[case.stage], model=str(folder), device=str(device), **options)
        self.model = self.pipe.model
        self.generator = self.model.generator
        self.autoencoder = self.model.autoencoder
        self.clip_encoder = self.model.clip_encoder
        dtype = next(self.generator.parameters()).dtype
        self.precision = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "fp32")

    @torch.no_grad()
    def generate(self, steps: int, **settings: Any) -> Tensor:
        case = self.case
        inputs: dict[str, Any] = {"noise": case.noise, "vit_frame": case.image}
        if case.stage == 2:
            self.model.negative_y = case.negative_y.to(self.device)
            inputs = {"noise": case.noise, "video_data": case.frames, "y": case.y.to(self.device)}
            inputs["posterior_noise"] = case.posterior_noise
        with ExitStack() as restored:
            for name, value in {"steps": steps, **settings}.items():
                restored.enter_context(patch.object(self.model.cfg, name, value))
            return self.model(inputs)

    def marks(self, mark: Callable[[], Any] = timer, count: int = 2, frames: int | None = None) -> list[Any]:
        """What ``mark`` returns after each of the first steps of a guided generation; the rest is left out.

        Args:
            mark: is called in the callback of the call.
            count: of steps.
            frames: the video's, which go through the network in windows of as many as the case's.
        """
        found: list[Any] = []

        def stepped(*_: Any) -> None:
            found.append(mark())
            if len(found) == count:
                raise Enough

        window = self.case.settings.max_frames
        self.pipe.chunk_size, self.pipe.overlap_size = window, window // 4
        length = frames or window
        keywords = {"max_frames": length} if self.case.stage == 1 else {}
        source = pictures(1)[0] if self.case.stage == 1 else {"video_path": _film(length)}
        with suppress(Enough):
            self.pipe(source, seed=0, callback=stepped, progress=False, **keywords)
        return found


def window_count(frames: int, window: int) -> int:
    """How many windows cover so many frames, each overlapping the one before by a quarter."""
    overlap = window // 4
    return max(-(-(frames - overlap) // (window - overlap)), 1)


def pictures(count: int) -> list[Image.Image]:
    """Random pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((128, 80)) for each in pixels]


def _film(frames: int) -> bytes:
    """A video's file, for stage two."""
    first, *rest = pictures(frames)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=125)
    return file.getvalue()
