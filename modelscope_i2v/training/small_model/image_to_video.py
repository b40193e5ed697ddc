"""Stage one: the velocity of a clip's latents, from its first frame's embedding."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ...models.transformers import Attention
from ...models.unet import UNet
from ...samplers.schedules import stable_diffusion_schedule
from .. import losses
from ..initialisation import start_as_scaling, start_clip
from ..scenes import Scene
from .architecture import CLIP, FRAMES, LATENTS, PLACE, SIZE, STAGE_ONE, unet_config
from .autoencoder import latents_of, load_autoencoder
from .phase import Phase, save_shard
from .tower import object_weights, picture_of, places

#: The first latents are the colours.
CHANNEL_WEIGHTS = torch.tensor([1.5] * 3 + [0.8] * (LATENTS - 3))
_SHARPNESS = 8.0  # of the start's attention: a neighbouring token gets exp(-4) of the nearest one's weight


def write_latents(folder: Path, count: int, shard: int = 50) -> None:
    """Encode the training scenes 0 .. count - 1, in files of ``shard``; those that are there are kept."""
    autoencoder = load_autoencoder(folder)
    (folder / "latents").mkdir(exist_ok=True)
    for start in range(0, count, shard):
        path = folder / "latents" / f"{start:06}.pt"
        if not path.exists():
            scenes = [Scene.from_seed(seed) for seed in range(start, min(start + shard, count))]
            entries = {
                "latents": torch.stack([latents_of(autoencoder, scene, SIZE) for scene in scenes]),
                "pictures": torch.stack([picture_of(scene) for scene in scenes]),
            }
            save_shard(entries, path)


class FirstStage(nn.Module):
    """The UNet and the image tower, which learns on at a lower rate."""

    def __init__(self, folder: Path):
        super().__init__()
        self.visual = start_clip(CLIP).visual
        self.visual.load_state_dict(torch.load(folder / "tower.pt", weights_only=True))
        self.unet = UNet(unet_config(**STAGE_ONE))
        start_as_scaling(self.unet, 1.0, 0.0)
        self.unet.context_embedding.load_state_dict(torch.load(folder / "context.pt", weights_only=True))
        for attention in context_attentions(self.unet):
            start_keys(attention)


def context_attentions(unet: UNet) -> list[Attention]:
    """The attentions to the context on the way up, whose queries can know where they are."""
    return [
        module
        for name, module in unet.output_blocks.named_modules()
        if name.endswith("1.transformer_blocks.0.attn2")
    ]


@torch.no_grad()
def start_keys(attention: Attention) -> None:
    """Make the first channels of each head's keys the place of the token."""
    attention.to_k.weight.zero_()
    for head in attention.to_k.weight.view(attention.heads, -1, attention.to_k.in_features):
        head[:PLACE, :PLACE] = _SHARPNESS * len(head) ** 0.5 * torch.eye(PLACE)


class Queries:
    """How far the queries of some attentions are from asking for the tokens at their own places.

    The places follow from the zeros that convolutions see beyond the edges. To find them is slow when only
    the video's error teaches it, and quick when this one does.
    """

    def __init__(self, attentions: list[Attention]):
        self._outputs: list[tuple[Attention, Tensor]] = []
        for attention in attentions:
            attention.to_q.register_forward_hook(
                lambda _, __, output, attention=attention: self._outputs.append((attention, output))
            )

    def error(self, frames: int) -> Tensor:
        """Mean squared distance, in positions of the grid, over what was computed since the last call."""
        p = places().view(FRAMES, -1, PLACE)[:frames].clone()
        p[..., 3] = 1
        errors = []
        for attention, output in self._outputs:
            heads = output.unflatten(-1, (attention.heads, -1)).unflatten(0, (-1, frames))
            errors.append((heads[..., :PLACE] - p[:, :, None]).square().mean())
        self._outputs.clear()
        return torch.stack(errors).sum()


class ImageToVideoPhase(Phase[FirstStage]):
    """Most clips are at timestep 999, where all must come from the picture, and nothing from the noise."""

    steps, rate = 4500, 2e-3
    rate_factors = {"visual.": 0.05, "unet.context_embedding": 0.3}
    batch, count, first_share, guided_steps = 6, 2400, 0.6, 600
    change_weight = 0.0

    def __init__(self, folder: Path):
        super().__init__(folder)
        write_latents(folder, self.count)
        torch.manual_seed(2)
        self.network = FirstStage(folder)
        self._queries = Queries(context_attentions(self.network.unet))
        self._schedule = stable_diffusion_schedule()
        shards = [torch.load(path, weights_only=True) for path in sorted((folder / "latents").glob("*.pt"))]
        self._latents = torch.cat([shard["latents"] for shard in shards])
        self._pictures = torch.cat([shard["pictures"] for shard in shards])
        height, width = self._latents.shape[3:]
        scenes = (Scene.from_seed(seed) for seed in range(len(self._latents)))
        self._weights = torch.stack([object_weights(scene, width, height).half() for scene in scenes])

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(self._latents), (self.batch,), generator=generator)
        x0, y = self._latents[index].float(), self.network.visual(self._pictures[index].float())[:, None]
        y = y * (torch.rand(len(y), 1, 1, generator=generator) > 0.05)
        t = torch.randint(999, (len(y),), generator=generator)
        t = torch.where(torch.rand(len(y), generator=generator) < self.first_share, 999, t)
        alpha, sigma = self._schedule.alphas[t].float(), self._schedule.sigmas[t].float()
        noise = torch.randn(x0.shape, generator=generator)
        noise += 0.1 * torch.randn((*x0.shape[:3], 1, 1), generator=generator)
        # Sampling starts from noise alone: the network is not to look for a scene in it.
        blind = t == 999
        shape = (-1, 1, 1, 1, 1)
        xt = (alpha * ~blind).view(shape) * x0 + sigma.view(shape) * noise
        errors = self.network.unet(xt, t, y) - losses.velocity_target(x0, noise, alpha, sigma)
        weights = 1 + 3 * self._weights[index].float()[:, None]
        loss = (CHANNEL_WEIGHTS * (errors.square() * weights).mean((0, 2, 3, 4))).mean()
        places = self._queries.error(FRAMES)
        figures = {"velocity": loss.item(), "places": places.item()}
        loss = loss + max(0.0, 1 - step / self.guided_steps) * places
        if blind.any():
            changes = errors[blind].diff(dim=2).square()
            figures.update(first=errors[blind].square().mean().item(), change=changes.mean().item())
            loss = loss + self.change_weight * (CHANNEL_WEIGHTS * changes.mean((0, 2, 3, 4))).mean()
        return loss, figures

    def save(self, network: FirstStage) -> None:
        torch.save(network.unet.state_dict(), self.folder / "image_to_video.pt")
        torch.save(network.visual.state_dict(), self.folder / "tower_joint.pt")


class SteadyPhase(ImageToVideoPhase):
    """Stage one goes on, with a loss of what changes from frame to frame, which flicker is most of."""

    steps, rate, guided_steps = 2400, 7e-4, 1
    first_share, change_weight = 0.75, 4.0

    def __init__(self, folder: Path):
        super().__init__(folder)
        for name, network in (("image_to_video", self.network.unet), ("tower_joint", self.network.visual)):
            network.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
