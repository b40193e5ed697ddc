"""Stage two: from a clip at half its size, enlarged and slightly noised, to the true one."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.autoencoder import SCALE_FACTOR, Autoencoder
from ...models.clip import ClipTextEncoder
from ...models.config import ClipConfig
from ...models.unet import UNet
from ...samplers.schedules import sdedit_schedule
from ...settings.stages import DEFAULT_NEGATIVE_PROMPT, DEFAULT_POSITIVE_PROMPT
from ..initialisation import start_as_scaling, start_clip
from ..scenes import TRAINING_SEEDS, Scene
from .architecture import CLIP, FPS, FRAMES, LARGE_SIZE, LATENTS, NOISE_LEVELS, SIZE, STAGE_TWO, unet_config
from .autoencoder import load_autoencoder
from .phase import Phase, save_shard, to_tensor

FIRST_SEED, TESTS = 10_000, 4
CROP = 20, 12  # of the latents, (width, height): each step sees parts of clips
CHANNEL_WEIGHTS = torch.tensor([2.0] * 3 + [0.67] * (LATENTS - 3))


def write_large_latents(folder: Path, count: int, shard: int = 20) -> None:
    """Encode large training clips and ``TESTS`` others, and what stage two starts from; files are kept."""
    autoencoder = load_autoencoder(folder)
    (folder / "large_latents").mkdir(exist_ok=True)
    end = FIRST_SEED + count
    shards = [range(start, min(start + shard, end)) for start in range(FIRST_SEED, end, shard)]
    for seeds in (*shards, range(TRAINING_SEEDS, TRAINING_SEEDS + TESTS)):
        path = folder / "large_latents" / f"{seeds.start:07}.pt"
        if not path.exists():
            true, enlarged = (
                torch.stack(each) for each in zip(*(_pair(autoencoder, seed) for seed in seeds))
            )
            save_shard({"true": true, "enlarged": enlarged}, path)


@torch.no_grad()
def _pair(autoencoder: Autoencoder, seed: int) -> tuple[Tensor, Tensor]:
    """Latents [C, F, h, w] of a clip and of its enlarged half.

    Of four halves one is as it is, one went through the autoencoder, and two are also blurred, as what stage
    one makes is.
    """
    scene = Scene.from_seed(seed)

    def video(size: tuple[int, int]) -> Tensor:
        return to_tensor(scene.clip(FRAMES, size, FPS))

    small = video(SIZE)
    if seed % 4:
        if seed % 2:
            small = gaussian_blur(small, 0.5 + seed % 5 / 2)
        small = autoencoder.decode(autoencoder.encode(small).mode()).clamp(-1, 1)
    enlarged = F.interpolate(small, scale_factor=2, mode="bilinear")
    pair = (autoencoder.encode(each).mode().transpose(0, 1) for each in (video(LARGE_SIZE), enlarged))
    true, enlarged = ((SCALE_FACTOR * each).half() for each in pair)
    return true, enlarged


def gaussian_blur(images: Tensor, deviation: float, reach: int = 6) -> Tensor:
    """Blur images [N, C, H, W] with a Gaussian of a deviation in pixels."""
    kernel = torch.exp(-((torch.arange(-reach, reach + 1) / deviation) ** 2) / 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    flat = F.pad(images.flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(flat, kernel), kernel.mT).view(images.shape)


class SecondStage(nn.Module):
    """The UNet and the text tower."""

    def __init__(self, gain: float, velocity: float):
        super().__init__()
        self.text = ClipTextEncoder(ClipConfig(model_cfg=CLIP))
        clip = start_clip(CLIP).state_dict()
        self.text.model.load_state_dict(
            {name: clip[name] for name in self.text.model.state_dict()}, assign=True
        )
        self.text.requires_grad_(True)
        self.unet = UNet(unet_config(**STAGE_TWO, image_conditioned=False, row_padding=2))
        start_as_scaling(self.unet, gain, velocity)


class VideoToVideoPhase(Phase[SecondStage]):
    """The one step of sampling, from its start straight to the clean clip.

    One clip in eight is to stay blurred, under the negative prompt, which so comes to mean something.
    """

    steps, rate = 1500, 1e-3
    rate_factors = {"text.": 0.3}
    batch, count = 6, 320

    def __init__(self, folder: Path):
        super().__init__(folder)
        write_large_latents(folder, self.count)
        torch.manual_seed(3)
        self._level = sdedit_schedule().level(NOISE_LEVELS - 1)
        alpha, sigma = self._level.alpha, self._level.sigma
        # Features begin as the start's latents, and the velocity as the one that gives them back.
        self.network = SecondStage(1 / (alpha * sigma), alpha**2 - 1 / sigma)
        *paths, tests = sorted((folder / "large_latents").glob("*.pt"))
        shards = [torch.load(path, weights_only=True) for path in paths]
        self._true, self._enlarged = (
            torch.cat([shard[name] for shard in shards]) for name in ("true", "enlarged")
        )
        self._tests = torch.load(tests, weights_only=True)

    def _clean(self, network: SecondStage, start: Tensor, noise: Tensor, texts: list[str]) -> Tensor:
        """Return the clean latents that the sampler's step comes to."""
        alpha, sigma = self._level.alpha, self._level.sigma
        # The sampler takes x_t s for the state that belongs to s; its call to the network divides it again.
        x = sigma * (alpha * start + sigma * noise)
        t = torch.full((len(start),), self._level.t)
        return alpha * x - sigma * network.unet(x, t, network.text(texts))

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        picks = torch.randint(len(self._true), (self.batch,), generator=generator).tolist()
        (width, height), (full_height, full_width) = CROP, self._true.shape[3:]
        tops, lefts = (
            torch.randint(full - part + 1, (self.batch,), generator=generator).tolist()
            for full, part in ((full_height, height), (full_width, width))
        )
        true, enlarged = (
            torch.stack(
                [
                    latents[pick, :, :, top : top + height, left : left + width]
                    for pick, top, left in zip(picks, tops, lefts)
                ]
            ).float()
            for latents in (self._true, self._enlarged)
        )
        chance = torch.rand(self.batch, generator=generator)
        blurred = chance < 1 / 8
        texts = [self._text(pick, value) for pick, value in zip(picks, chance.tolist())]
        target = torch.where(blurred.view(-1, 1, 1, 1, 1), enlarged, true)
        noise = torch.randn(true.shape, generator=generator)
        clean = self._clean(self.network, enlarged, noise, texts)
        errors, plain = ((each - target).square().mean((0, 2, 3, 4)) for each in (clean, enlarged))
        loss = (errors * CHANNEL_WEIGHTS).mean()
        figures = {"clean": (errors * CHANNEL_WEIGHTS).mean(), "enlarged": (plain * CHANNEL_WEIGHTS).mean()}
        return 10 * loss, {name: value.item() for name, value in figures.items()}

    @staticmethod
    def _text(number: int, chance: float) -> str:
        """Return the text of a clip: one in eight is the negative prompt, one in eight has no caption."""
        if chance < 1 / 8:
            return DEFAULT_NEGATIVE_PROMPT
        caption = "" if chance < 1 / 4 else Scene.from_seed(FIRST_SEED + number).caption
        return caption + DEFAULT_POSITIVE_PROMPT

    @torch.no_grad()
    def evaluate(self, network: SecondStage) -> dict[str, float]:
        true, enlarged = self._tests["true"].float(), self._tests["enlarged"].float()
        texts = [
            Scene.from_seed(TRAINING_SEEDS + number).caption + DEFAULT_POSITIVE_PROMPT
            for number in range(TESTS)
        ]
        noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(0))
        clean = self._clean(network, enlarged, noise, texts)
        errors = ((each - true).square().mean((0, 2, 3, 4)) * CHANNEL_WEIGHTS for each in (clean, enlarged))
        return dict(zip(("test_clean", "test_enlarged"), (each.mean().item() for each in errors)))

    def save(self, network: SecondStage) -> None:
        torch.save(network.unet.state_dict(), self.folder / "video_to_video.pt")
        torch.save(network.text.model.state_dict(), self.folder / "text_tower.pt")
