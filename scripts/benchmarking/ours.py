"""This package's side. All that the benchmark knows of the package's models is here, and is public."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterable, Iterator

import torch
from torch import Tensor

from modelscope_i2v.engine.latents import decode_video, encode_video
from modelscope_i2v.engine.precision import precision_name
from modelscope_i2v.engine.progress import PhaseClock
from modelscope_i2v.plugin.models import ImageToVideoModel, VideoToVideoModel
from modelscope_i2v.samplers.velocity import window_starts
from modelscope_i2v.settings.configuration import StageSettings
from modelscope_i2v.settings.keywords import check_keywords
from modelscope_i2v.settings.request import Request

from .sizes import Case
from .timing import Enough


def windows(settings: StageSettings, frames: int) -> int:
    """In how many windows of ``max_frames`` a video is denoised."""
    request = Request.resolve(settings)
    return len(window_starts(frames, request.window, request.overlap))


class _DenoisingClock(PhaseClock):
    """Has a watch run while there is denoising; what comes after it is left out."""

    def __init__(self, watch: Any):
        super().__init__()
        self.watch = watch

    @contextmanager
    def phase(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        if name != "denoising":
            with super().phase(name, device):
                yield
            return
        self.watch.start()
        yield
        self.watch.stop()
        raise Enough


class Ours:
    """One stage's model, loaded from a folder."""

    def __init__(
        self,
        folder: Path,
        case: Case,
        device: torch.device,
        precision: str,
        compile: bool = False,
        low_memory: bool = False,
    ):
        self.case, self.device = case, device
        model_type = ImageToVideoModel if case.stage == 1 else VideoToVideoModel
        # Left to itself, a small GPU would have the networks take turns on it.
        settings = {"precision": precision, "low_memory": low_memory, "compile": compile}
        self.model = model_type(str(folder), device=str(device), **settings)
        if case.stage == 2:
            self.model.negative_y = case.negative_y

    @property
    def precision(self) -> str:
        return precision_name(self.model.dtype)

    def weights(self) -> Iterable[Tensor]:
        """What the networks hold."""
        return self.model.state_dict().values()

    def share_autoencoder(self, other: Ours) -> None:
        """As a pipeline has its second stage use the first one's."""
        self.model.share_autoencoder(other.model)

    @torch.no_grad()
    def velocity(self, t: int) -> Tensor:
        """The UNet's prediction [1, 4, F, h, w] for the case's noise."""
        conditioning = {"y": self.case.y.to(self.device)}
        if self.case.stage == 1:
            conditioning["fps"] = torch.tensor([self.case.settings.target_fps], device=self.device)
        timesteps = torch.tensor([t], device=self.device)
        return self.model.generator(self.case.noise.to(self.device), timesteps, **conditioning)

    @torch.no_grad()
    def encode(self) -> Tensor:
        """The latent [1, 4, F, h, w] of the case's frames."""
        case = self.case
        latent = tuple(case.noise.shape[3:])
        noise = case.posterior_noise
        return encode_video(self.model.autoencoder, case.frames, case.pixels, latent, noise)

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The video [1, 3, F, H, W] of the case's latents."""
        latents = self.case.latents.to(self.device)
        return decode_video(self.model.autoencoder, latents, self.case.pixels, self.model.cfg.decoder_bs)

    def generate(self, steps: int, solver_mode: str = "fast", **approximations: Any) -> Tensor:
        """The whole stage: a video [1, 3, F, H, W]."""
        return self._run(self.case, steps=steps, solver_mode=solver_mode, **approximations)

    def step(self, watch: Any) -> None:
        """One guided step, the second of a generation, between ``watch.start()`` and ``watch.stop()``.

        It is what happens between two calls of a request's callback, and so whatever the models do in a
        step; what they do once for a generation is not part of it.
        """
        calls = 0

        def stepped(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                watch.start()
            else:
                watch.stop()
                raise Enough

        with suppress(Enough):
            self._run(self.case, callback=stepped)

    def denoise(self, watch: Any, case: Case, steps: int) -> None:
        """The denoising of a video of another length, between ``watch.start()`` and ``watch.stop()``.

        Args:
            watch: as above.
            case: of this stage.
            steps: of the generation.
        """
        keywords = {"steps": steps, "chunk_size": self.case.settings.max_frames}
        if case.stage == 1:
            keywords["max_frames"] = case.settings.max_frames
        with suppress(Enough):
            self._run(case, _DenoisingClock(watch), **keywords)

    def _run(self, case: Case, clock: PhaseClock | None = None, **keywords: Any) -> Tensor:
        if case.stage == 1:
            keywords.pop("solver_mode", None)
            inputs: dict[str, Any] = {"vit_frame": case.image}
        else:
            inputs = {"video_data": case.frames, "y": case.y, "posterior_noise": case.posterior_noise}
        keywords = check_keywords(case.settings.stage, {"progress": False, **keywords})
        request = Request.resolve(self.model.cfg, keywords)
        return self.model({**inputs, "noise": case.noise, "request": request}, clock=clock)
