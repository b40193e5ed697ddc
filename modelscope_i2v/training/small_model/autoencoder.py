"""The autoencoder: whole small frames, and parts of large ones, in and out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...models.autoencoder import SCALE_FACTOR, Autoencoder
from .. import losses
from ..initialisation import start_as_resampling
from ..scenes import TRAINING_SEEDS, Scene
from .architecture import FPS, FRAMES, LARGE_SIZE, LATENTS, SIZE, autoencoder_config
from .phase import Phase, psnr, to_tensor


class AutoencoderPhase(Phase[Autoencoder]):
    """Whole small frames, and parts of large ones, in and out."""

    steps, rate, average_decay = 3000, 6e-4, 0.995
    batch, size, large_size = 3, SIZE, LARGE_SIZE

    def __init__(self, folder: Path):
        super().__init__(folder)
        torch.manual_seed(0)
        self.network = Autoencoder(autoencoder_config())
        generator = torch.Generator().manual_seed(0)
        start_as_resampling(self.network, torch.cat([self._frame(generator) for _ in range(64)]))
        self.network.to(memory_format=torch.channels_last)
        scenes = [Scene.from_seed(TRAINING_SEEDS + number) for number in range(12)]
        self._small = to_tensor(np.stack([scene.frame(0.5, self.size) for scene in scenes]))
        self._large = to_tensor(np.stack([scene.frame(0.5, self.large_size) for scene in scenes[:4]]))

    def _frame(self, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(TRAINING_SEEDS, (), generator=generator))
        number, large, left, top = torch.rand(4, generator=generator).tolist()
        frame = Scene.from_seed(seed).frame(
            int(number * FRAMES) / FPS, self.large_size if large < 0.4 else self.size
        )
        (width, height), (full_width, full_height) = self.size, frame.shape[1::-1]
        x, y = int(left * (full_width - width + 1)), int(top * (full_height - height + 1))
        return to_tensor(frame[None, y : y + height, x : x + width])

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        images = torch.cat([self._frame(generator) for _ in range(self.batch)])
        posterior = self.network.encode(images)
        decoded = self.network.decode(posterior.sample(generator=generator))
        error = losses.reconstruction_loss(decoded, images)
        latents = posterior.mean * SCALE_FACTOR
        spread = losses.second_moment_penalty(latents, torch.tensor([1.0] * 3 + [0.5] * (LATENTS - 3)))
        noise = losses.kl_divergence(latents, posterior.logvar)
        return error + 1e-4 * spread + 1e-6 * noise, {"error": error.item(), "spread": spread.item()}

    @torch.no_grad()
    def evaluate(self, network: Autoencoder) -> dict[str, float]:
        figures = {}
        for name, images in (("small", self._small), ("large", self._large)):
            latents = network.encode(images).mode()
            figures[name] = psnr(network.decode(latents), images)
        deviations = (latents * SCALE_FACTOR).transpose(0, 1).flatten(1).std(1)
        return {**figures, "widest": deviations.max().item(), "narrowest": deviations.min().item()}

    def save(self, network: Autoencoder) -> None:
        torch.save(network.state_dict(), self.folder / "autoencoder.pt")


def load_autoencoder(folder: Path) -> Autoencoder:
    """The trained autoencoder, for use only."""
    network = Autoencoder(autoencoder_config())
    network.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True))
    return network.requires_grad_(False).eval()


@torch.no_grad()
def latents_of(autoencoder: Autoencoder, scene: Scene, size: tuple[int, int], frames: int = FRAMES) -> Tensor:
    """The diffusion's latents [C, F, h, w] of a scene, float16."""
    video = to_tensor(scene.clip(frames, size, FPS))
    return SCALE_FACTOR * autoencoder.encode(video).mode().transpose(0, 1).half()
