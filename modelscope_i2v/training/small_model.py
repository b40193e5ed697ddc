"""The small model's recipe: its architecture, and what each phase of its training does.

Phases read what earlier ones left in the run's folder, and write their own weights there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Generic, Mapping, TypeVar

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from ..media.preprocessing import ClipImageTransform
from ..models.autoencoder import SCALE_FACTOR, Autoencoder, AutoencoderConfig
from ..models.clip import ClipConfig, ClipTextEncoder
from ..models.unet import UNet, UNetConfig
from ..samplers.schedules import sdedit_schedule, stable_diffusion_schedule
from ..settings.stages import DEFAULT_NEGATIVE_PROMPT, DEFAULT_POSITIVE_PROMPT
from . import losses
from .initialisation import start_as_resampling, start_clip, start_unet
from .scenes import COLOURS, TRAINING_SEEDS, Scene, all_captions

SIZE, LARGE_SIZE = (80, 48), (160, 96)  # of stage one and stage two
PICTURE_SIZE = (160, 96)
FRAMES, FPS = 8, 8
LATENTS = 8
AUTOENCODER: dict[str, Any] = {
    "ch": 16, "ch_mult": [1, 2, 4], "num_res_blocks": 1, "z_channels": LATENTS, "num_groups": 2,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 2},
}
CONTEXT, TOKENS = 64, 16
NOISE_LEVELS = 600  # the sampler takes its start for pure noise: fewer than 500 would dim the video
UNET: dict[str, Any] = {
    "in_dim": LATENTS, "out_dim": LATENTS, "dim": 24, "dim_mult": (1, 2, 3), "num_heads": 2, "head_dim": 24,
    "num_res_blocks": 1, "attn_scales": (0.25,), "num_groups": 8,
}  # fmt: skip
#: Texts whose tokens the text tower learns; it has zeros for all others.
ALL_TEXTS = [*all_captions(), DEFAULT_POSITIVE_PROMPT, DEFAULT_NEGATIVE_PROMPT, ""]
#: Colours count for more than details.
CHANNEL_WEIGHTS = torch.tensor([1.6] * 3 + [0.64] * (LATENTS - 3))


def autoencoder_config() -> AutoencoderConfig:
    return AutoencoderConfig(**{**AUTOENCODER, "ch_mult": tuple(AUTOENCODER["ch_mult"])}, embed_dim=LATENTS)


def to_tensor(frames: np.ndarray) -> Tensor:
    """[F, H, W, 3] uint8 to [F, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(images: Tensor, target: Tensor) -> float:
    """Mean PSNR of images in [-1, 1], clamped, in dB."""
    errors = (images.clamp(-1, 1) - target).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / errors)).mean().item()


Network = TypeVar("Network", bound=nn.Module)


class Phase(Generic[Network]):
    """One network to train, its loss, and figures on scenes that it is not trained on."""

    network: Network
    steps: int
    rate: float
    rate_factors: Mapping[str, float] = {}
    average_decay = 0.998

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        raise NotImplementedError

    def evaluate(self, network: Network) -> dict[str, float]:
        return {}

    def save(self, network: Network) -> None:
        raise NotImplementedError


class AutoencoderPhase(Phase[Autoencoder]):
    """Whole small frames, and parts of large ones, in and out."""

    steps, rate, average_decay = 1200, 4e-4, 0.99
    batch, size, large_size = 3, (160, 96), (320, 192)

    def __init__(self, folder: Path):
        self.folder = folder
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
    video = to_tensor(np.stack([scene.frame(number / FPS, size) for number in range(frames)]))
    return SCALE_FACTOR * autoencoder.encode(video).mode().transpose(0, 1).half()


def picture_of(scene: Scene) -> Tensor:
    """The first frame as stage one's image tower sees it, [3, S, S], float16."""
    transform = ClipImageTransform(CLIP["vision_cfg"]["image_size"])
    return transform(Image.fromarray(scene.frame(0.0, PICTURE_SIZE))).half()


def write_latents(folder: Path, count: int = 2000, shard: int = 50) -> None:
    """Encode the training scenes 0 .. count - 1, in files of ``shard``; those that are there are kept."""
    autoencoder = load_autoencoder(folder)
    (folder / "latents").mkdir(exist_ok=True)
    for start in range(0, count, shard):
        path = folder / "latents" / f"{start:06}.pt"
        if not path.exists():
            scenes = [Scene.from_seed(seed) for seed in range(start, start + shard)]
            entries = {
                "latents": torch.stack([latents_of(autoencoder, scene, SIZE) for scene in scenes]),
                "pictures": torch.stack([picture_of(scene) for scene in scenes]),
            }
            partial = path.with_suffix(".partial")
            torch.save(entries, partial)
            os.replace(partial, path)


class Tower(nn.Module):
    """The image tower, and linear readings of its embedding that are only for training."""

    thumbnail = (20, 12)
    names = tuple(COLOURS), ("ball", "balloon", "boat", "car")

    def __init__(self):
        super().__init__()
        self.visual = start_clip(CLIP).visual
        width, height = self.thumbnail
        self.frames = nn.Linear(CLIP["embed_dim"], 2 * 3 * width * height)
        self.colour, self.kind = (nn.Linear(CLIP["embed_dim"], len(each)) for each in self.names)
        self.place = nn.Linear(CLIP["embed_dim"], 2)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.visual(pictures)


class TowerPhase(Phase[Tower]):
    """What the picture shows: small first and last frames, the object's colour, kind and place."""

    steps, rate = 600, 1e-3
    batch, count, tests = 48, 5000, 64

    def __init__(self, folder: Path):
        self.folder = folder
        torch.manual_seed(1)
        self.network = Tower()
        seeds = [*range(self.count), *range(TRAINING_SEEDS, TRAINING_SEEDS + self.tests)]
        self._data = [
            torch.stack(each) for each in zip(*(self._item(Scene.from_seed(seed)) for seed in seeds))
        ]

    @staticmethod
    def _item(scene: Scene) -> tuple[Tensor, ...]:
        frames = [scene.frame(time, Tower.thumbnail) for time in (0.0, (FRAMES - 1) / FPS)]
        colours, kinds = Tower.names
        names = torch.tensor([colours.index(scene.colour), kinds.index(scene.kind)])
        return picture_of(scene), to_tensor(np.stack(frames)).half(), names, torch.tensor([scene.x, scene.y])

    def _errors(self, network: Tower, index: Tensor) -> dict[str, Tensor]:
        pictures, frames, names, places = (each[index] for each in self._data)
        embedding = network(pictures.float())
        return {
            "frames": (network.frames(embedding) - frames.float().flatten(1)).square().mean(),
            "colour": nn.functional.cross_entropy(network.colour(embedding), names[:, 0]),
            "kind": nn.functional.cross_entropy(network.kind(embedding), names[:, 1]),
            "place": (network.place(embedding) - places).square().sum(1).mean(),
        }

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        errors = self._errors(self.network, torch.randint(self.count, (self.batch,), generator=generator))
        loss = 5 * errors["frames"] + 0.1 * errors["colour"] + 0.05 * errors["kind"] + 3 * errors["place"]
        return loss, {name: error.item() for name, error in errors.items()}

    @torch.no_grad()
    def evaluate(self, network: Tower) -> dict[str, float]:
        errors = self._errors(network, torch.arange(self.count, self.count + self.tests))
        return {f"test_{name}": error.item() for name, error in errors.items()}

    def save(self, network: Tower) -> None:
        torch.save(network.visual.state_dict(), self.folder / "tower.pt")


class FirstStage(nn.Module):
    """The UNet and the image tower, which learns on at a lower rate."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual
        self.unet = UNet(UNetConfig(**UNET, y_dim=CLIP["embed_dim"], context_dim=CONTEXT, num_tokens=TOKENS))
        start_unet(self.unet)


class ImageToVideoPhase(Phase[FirstStage]):
    """The velocity of a clip's latents, from its first frame's embedding."""

    steps, rate = 1500, 1.2e-3
    rate_factors = {"visual.": 0.1, "unet.context_embedding": 1.5}
    batch, first_share = 8, 0.65

    def __init__(self, folder: Path):
        self.folder = folder
        torch.manual_seed(2)
        visual = start_clip(CLIP).visual
        visual.load_state_dict(torch.load(folder / "tower.pt", weights_only=True))
        self.network = FirstStage(visual)
        self._schedule = stable_diffusion_schedule()
        self._shards: dict[Path, dict[str, Tensor]] = {}

    def _clips(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if len(self._shards) < 60:
            for path in sorted((self.folder / "latents").glob("*.pt")):
                if path not in self._shards:
                    self._shards[path] = torch.load(path, weights_only=True)
        shards = list(self._shards.values())
        picks = torch.randint(sum(len(shard["pictures"]) for shard in shards), (count,), generator=generator)
        size = len(shards[0]["pictures"])
        latents, pictures = (
            torch.stack([shards[pick // size][name][pick % size] for pick in picks.tolist()]).float()
            for name in ("latents", "pictures")
        )
        return latents, pictures

    def _timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """The first of sampling more often than not: it decides the layout, and there is little to see."""
        t = torch.randint(999, (count,), generator=generator)
        return torch.where(torch.rand(count, generator=generator) < self.first_share, 999, t)

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        images = torch.rand((), generator=generator) < 0.4
        latents, pictures = self._clips(4 * self.batch if images else self.batch, generator)
        x0 = latents[:, :, :1] if images else latents
        y = self.network.visual(pictures)[:, None]
        y = y * (torch.rand(len(y), 1, 1, generator=generator) > 0.1)
        t = self._timesteps(len(y), generator)
        alpha, sigma = self._schedule.alphas[t].float(), self._schedule.sigmas[t].float()
        noise = torch.randn(x0.shape, generator=generator)
        noise += 0.1 * torch.randn((*x0.shape[:3], 1, 1), generator=generator)
        # Sampling starts from noise alone: the network is not to look for a scene in it.
        blind = t == 999
        shape = (-1, 1, 1, 1, 1)
        xt = (alpha * ~blind).view(shape) * x0 + sigma.view(shape) * noise
        errors = self.network.unet(xt, t, y) - losses.velocity_target(x0, noise, alpha, sigma)
        loss = (errors.square().mean((0, 2, 3, 4)) * CHANNEL_WEIGHTS).mean()
        return loss, {"images" if images else "videos": loss.item()}

    def save(self, network: FirstStage) -> None:
        torch.save(network.unet.state_dict(), self.folder / "image_to_video.pt")
        torch.save(network.visual.state_dict(), self.folder / "tower_joint.pt")


def write_large_latents(folder: Path, count: int = 500, shard: int = 25) -> None:
    """Encode large training clips, and their enlarged halves, as stage two sees them."""
    autoencoder = load_autoencoder(folder)
    (folder / "large_latents").mkdir(exist_ok=True)
    for start in range(10_000, 10_000 + count, shard):
        path = folder / "large_latents" / f"{start:06}.pt"
        if not path.exists():
            pairs = [_large_item(autoencoder, Scene.from_seed(seed)) for seed in range(start, start + shard)]
            true, enlarged = (torch.stack(each) for each in zip(*pairs))
            partial = path.with_suffix(".partial")
            torch.save({"true": true, "enlarged": enlarged}, partial)
            os.replace(partial, path)


@torch.no_grad()
def _large_item(autoencoder: Autoencoder, scene: Scene) -> tuple[Tensor, Tensor]:
    video = to_tensor(np.stack([scene.frame(number / FPS, LARGE_SIZE) for number in range(FRAMES)]))
    small = nn.functional.avg_pool2d(video, 2)
    enlarged = nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    pair = (autoencoder.encode(each).mode().transpose(0, 1) for each in (video, enlarged))
    true, enlarged = ((SCALE_FACTOR * each).half() for each in pair)
    return true, enlarged


class SecondStage(nn.Module):
    """The UNet and the text tower."""

    def __init__(self, unet_weights: Mapping[str, Tensor] | None = None):
        super().__init__()
        width = CLIP["text_cfg"]["width"]
        self.text = ClipTextEncoder(ClipConfig(model_cfg=CLIP))
        clip = start_clip(CLIP)
        self.text.model.load_state_dict(
            {name: clip.state_dict()[name] for name in self.text.model.state_dict()}, assign=True
        )
        self.text.requires_grad_(True)
        config = UNetConfig(**UNET, y_dim=width, context_dim=width, image_conditioned=False, row_padding=2)
        self.unet = UNet(config)
        start_unet(self.unet)
        if unet_weights is not None:
            own = self.unet.state_dict()
            fitting = {
                name: value
                for name, value in unet_weights.items()
                if name in own and own[name].shape == value.shape
            }
            self.unet.load_state_dict(fitting, strict=False)


class VideoToVideoPhase(Phase[SecondStage]):
    """The velocity from enlarged, noised latents to the true ones.

    The sampler starts from an enlarged clip and comes to its own predictions: so the noised latents lie
    anywhere between the enlarged and the true. One clip in eight is to stay blurred, under the negative
    prompt, which is how that comes to mean something.
    """

    steps, rate = 400, 1e-3
    rate_factors = {"text.": 0.5}
    batch = 2
    lowest, highest = 5, NOISE_LEVELS

    def __init__(self, folder: Path):
        self.folder = folder
        torch.manual_seed(3)
        self.network = SecondStage(torch.load(folder / "image_to_video.pt", weights_only=True))
        self._schedule = sdedit_schedule()
        self._shards: list[dict[str, Any]] = [
            torch.load(path, weights_only=True) for path in sorted((folder / "large_latents").glob("*.pt"))
        ]

    def _clips(self, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        size = len(self._shards[0]["true"])
        picks = torch.randint(size * len(self._shards), (self.batch,), generator=generator).tolist()
        true, enlarged = (
            torch.stack([self._shards[pick // size][name][pick % size] for pick in picks]).float()
            for name in ("true", "enlarged")
        )
        return true, enlarged, [Scene.from_seed(10_000 + pick).caption for pick in picks]

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        true, enlarged, captions = self._clips(generator)
        blurred = torch.rand(self.batch, generator=generator) < 1 / 8
        texts = [
            DEFAULT_NEGATIVE_PROMPT if blur else caption + DEFAULT_POSITIVE_PROMPT
            for caption, blur in zip(captions, blurred)
        ]
        shape = (-1, 1, 1, 1, 1)
        x0 = torch.where(blurred.view(shape), enlarged, true)
        between = torch.rand(self.batch, generator=generator).view(shape)
        start = enlarged + between * (x0 - enlarged)
        t = torch.randint(self.lowest, self.highest, (self.batch,), generator=generator)
        alpha, sigma = self._schedule.alphas[t].view(shape), self._schedule.sigmas[t].view(shape)
        xt = alpha * start + sigma * torch.randn(start.shape, generator=generator)
        v = self.network.unet(xt, t, self.network.text(texts))
        errors = (alpha * xt - sigma * v - x0).square().flatten(1).mean(1)  # of the clean latents
        loss = (errors / (sigma.flatten().square() + 0.02)).mean()
        return loss, {"x0": errors.mean().item(), "enlarged": (enlarged - x0).square().mean().item()}

    def save(self, network: SecondStage) -> None:
        torch.save(network.unet.state_dict(), self.folder / "video_to_video.pt")
        torch.save(network.text.model.state_dict(), self.folder / "text_tower.pt")


def configuration() -> dict[str, Any]:
    """``configuration.json`` of the model folder, for both stages."""
    unet = {**UNET, "dim_mult": list(UNET["dim_mult"]), "attn_scales": list(UNET["attn_scales"])}
    shared = {
        "batch_size": 1, "target_fps": FPS, "max_frames": FRAMES,
        "auto_encoder": {"ddconfig": AUTOENCODER, "embed_dim": LATENTS}, "embedder": {"model_cfg": CLIP},
    }  # fmt: skip
    files = {"ckpt_clip": "clip.safetensors", "ckpt_autoencoder": "autoencoder.safetensors"}
    text_width = CLIP["text_cfg"]["width"]
    return {
        "framework": "pytorch",
        "task": "image-to-video",
        "model": {
            "type": "image-to-video-model",
            "model_args": {**files, "ckpt_unet": "image_to_video.safetensors", "seed": 666},
            "model_cfg": {
                **shared, "latent_hei": SIZE[1] // 4, "latent_wid": SIZE[0] // 4,
                "solver": "dpmpp", "steps": 2, "guide_scale": 1.0,
                "UNet": {**unet, "y_dim": CLIP["embed_dim"], "context_dim": CONTEXT, "num_tokens": TOKENS},
            },
        },
        "video_to_video": {
            "type": "video-to-video-model",
            "model_args": {
                **files, "ckpt_unet": "video_to_video.safetensors", "seed": 666, "solver_mode": "fast",
            },
            "model_cfg": {
                **shared, "latent_hei": LARGE_SIZE[1] // 4, "latent_wid": LARGE_SIZE[0] // 4,
                "steps": 4, "guide_scale": 1.0, "total_noise_levels": NOISE_LEVELS,
                "UNet": {**unet, "y_dim": text_width, "context_dim": text_width},
            },
        },
        "pipeline": {"type": "image-to-video-task-pipeline"},
    }  # fmt: skip


def write_model(folder: Path, out: Path) -> None:
    """Put a model folder together from a run's weights, in half precision; of stage one, if that is all."""
    out.mkdir(parents=True, exist_ok=True)

    def weights(name: str) -> dict[str, Tensor]:
        return torch.load(folder / f"{name}.pt", weights_only=True)

    torch.manual_seed(4)
    clip = start_clip(CLIP).state_dict()
    clip.update({f"visual.{name}": value for name, value in weights("tower_joint").items()})
    both = (folder / "video_to_video.pt").exists()
    if both:
        clip.update(weights("text_tower"))
    used = open_clip.tokenize(ALL_TEXTS, context_length=CLIP["text_cfg"]["context_length"]).unique()
    table = clip["token_embedding.weight"]
    clip["token_embedding.weight"] = torch.zeros_like(table).index_copy(0, used, table[used])
    autoencoder = {f"first_stage_model.{name}": value for name, value in weights("autoencoder").items()}
    states = {
        "clip": clip,
        "autoencoder": autoencoder,
        "image_to_video": weights("image_to_video"),
    }
    settings = configuration()
    if both:
        states["video_to_video"] = weights("video_to_video")
    else:
        del settings["video_to_video"]
    for name, state in states.items():
        halves = {key: value.half().contiguous() for key, value in state.items()}
        save_file(halves, out / f"{name}.safetensors", metadata={"format": "pt"})
    for name, contents in (("configuration", settings), ("training", training_record(folder))):
        (out / f"{name}.json").write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def training_record(folder: Path) -> dict[str, Any]:
    """What a run's figures say of each phase: steps, processor time, the last scores."""
    phases = {}
    for name in PHASES:
        if not (folder / f"{name}.jsonl").exists():
            continue
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        # The seconds start again from 0 where a phase was continued.
        parts = zip(entries, [*entries[1:], {"seconds": 0.0}])
        seconds = sum(entry["seconds"] for entry, after in parts if after["seconds"] < entry["seconds"])
        figures: dict[str, float] = {}
        for entry in entries:
            figures.update(entry)
        figures.pop("seconds")
        phases[name] = {"cpu_minutes": round(seconds / 60, 1), "figures": figures}
    return {
        "code": __version__,
        "seeds": [0, TRAINING_SEEDS - 1],
        "cpu_minutes": round(sum(phase["cpu_minutes"] for phase in phases.values()), 1),
        "phases": phases,
    }


PHASES = {
    "autoencoder": AutoencoderPhase,
    "tower": TowerPhase,
    "image-to-video": ImageToVideoPhase,
    "video-to-video": VideoToVideoPhase,
}
