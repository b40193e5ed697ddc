"""Stage one's image tower, trained with the layers that turn its embedding into the UNet's context."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...media.preprocessing import ClipImageTransform
from ...models.unet import UNet
from ..initialisation import start_clip
from ..scenes import COLOURS, TRAINING_SEEDS, Scene
from .architecture import CLIP, CONTENT, FPS, FRAMES, GRID, PLACE, SIZE, STAGE_ONE, unet_config
from .phase import Phase

KINDS = ("ball", "balloon", "boat", "car")


def picture_of(scene: Scene) -> Tensor:
    """The first frame as the image tower sees it, [3, S, S], float16."""
    transform = ClipImageTransform(CLIP["vision_cfg"]["image_size"])
    return transform(Image.fromarray(scene.frame(0.0, SIZE))).half()


def thumbnails_of(scene: Scene) -> Tensor:
    """All frames at two pixels a position of the context's grid, [F, 2 h, 2 w, 3] uint8."""
    width, height = GRID
    frames = scene.clip(FRAMES, (4 * width, 4 * height), FPS)
    return torch.from_numpy(
        frames.reshape(FRAMES, 2 * height, 2, 2 * width, 2, 3).mean((2, 4)).round()
    ).byte()


def object_weights(scene: Scene, width: int, height: int) -> Tensor:
    """[F, height, width]: 1 in the object's place, falling to 0 around it."""
    y, x = np.mgrid[:height, :width] + 0.5
    x, y = (x - width / 2) / height, y / height - 0.5
    weights = []
    for number in range(FRAMES):
        cx, cy = scene.position(number / FPS)
        distance = ((x - cx) ** 2 + (y - cy) ** 2) / (0.6 * scene.size) ** 2
        weights.append(np.exp(-(distance**2)))
    return torch.from_numpy(np.stack(weights)).float()


class Tower(nn.Module):
    """The image tower, the context's layers, and readings of the embedding that are only for training."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = start_clip(CLIP).visual
        self.context_embedding = UNet(unet_config(**STAGE_ONE)).context_embedding
        start_context(self.context_embedding)
        self.colour = nn.Linear(CLIP["embed_dim"], len(COLOURS))
        self.kind = nn.Linear(CLIP["embed_dim"], len(KINDS))
        self.place = nn.Linear(CLIP["embed_dim"], 2)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.visual(pictures)

    def thumbnails(self, embedding: Tensor) -> Tensor:
        """Read the context's content as frames [B, F, 2 h, 2 w, 3] in [-1, 1]."""
        width, height = GRID
        tokens = self.context_embedding(embedding).view(-1, FRAMES, height, width, PLACE + CONTENT)
        blocks = tokens[..., PLACE:].unflatten(-1, (2, 2, 3))
        return blocks.permute(0, 1, 2, 4, 3, 5, 6).reshape(-1, FRAMES, 2 * height, 2 * width, 3)


@torch.no_grad()
def start_context(context_embedding: nn.Sequential) -> None:
    """Let each token say where it stands, whatever the embedding: see ``places``."""
    last = cast(nn.Linear, context_embedding[2])
    last.weight.view(-1, PLACE + CONTENT, last.in_features)[:, :PLACE] = 0
    last.bias.view(-1, PLACE + CONTENT)[:] = torch.cat([places(), torch.zeros(len(places()), CONTENT)], 1)


def places() -> Tensor:
    """[F h w, 4]: column, row and frame p of each token from the middle, and -|p|^2 / 2.

    The product of a token's with (q, 1) is |q|^2 / 2 - |q - p|^2 / 2: the token nearest to q has the most.
    """
    axes = [torch.arange(count) - (count - 1) / 2 for count in (FRAMES, *GRID[::-1])]
    frame, row, column = torch.meshgrid(*axes, indexing="ij")
    p = torch.stack([column, row, frame], -1).view(-1, 3)
    return torch.cat([p, -p.square().sum(1, keepdim=True) / 2], 1)


class TowerPhase(Phase[Tower]):
    """Small frames of the whole clip, and the object's colour, kind and place, from its first frame."""

    steps, rate = 2400, 1.5e-3
    batch, count, tests = 48, 8000, 64

    def __init__(self, folder: Path):
        super().__init__(folder)
        torch.manual_seed(1)
        self.network = Tower()
        seeds = [*range(self.count), *range(TRAINING_SEEDS, TRAINING_SEEDS + self.tests)]
        items = (self._item(Scene.from_seed(seed)) for seed in seeds)
        self._data = [torch.stack(each) for each in zip(*items)]

    @staticmethod
    def _item(scene: Scene) -> tuple[Tensor, ...]:
        names = torch.tensor([list(COLOURS).index(scene.colour), KINDS.index(scene.kind)])
        weights = object_weights(scene, 2 * GRID[0], 2 * GRID[1]).half()
        return picture_of(scene), thumbnails_of(scene), weights, names, torch.tensor([scene.x, scene.y])

    def _errors(self, network: Tower, index: Tensor) -> dict[str, Tensor]:
        pictures, frames, weights, names, places = (each[index] for each in self._data)
        embedding = network(pictures.float())
        errors = (network.thumbnails(embedding) - (frames.float() / 127.5 - 1)).square().mean(-1)
        weights = weights.float()
        return {
            "frames": errors.mean(),
            "object": (errors * weights).sum() / weights.sum(),
            "colour": F.cross_entropy(network.colour(embedding), names[:, 0]),
            "kind": F.cross_entropy(network.kind(embedding), names[:, 1]),
            "place": (network.place(embedding) - places).square().sum(1).mean(),
        }

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        errors = self._errors(self.network, torch.randint(self.count, (self.batch,), generator=generator))
        shares = {"frames": 5.0, "object": 1.0, "colour": 0.1, "kind": 0.05, "place": 3.0}
        loss = torch.stack([shares[name] * error for name, error in errors.items()]).sum()
        return loss, {name: error.item() for name, error in errors.items()}

    @torch.no_grad()
    def evaluate(self, network: Tower) -> dict[str, float]:
        errors = self._errors(network, torch.arange(self.count, self.count + self.tests))
        return {f"test_{name}": error.item() for name, error in errors.items()}

    def save(self, network: Tower) -> None:
        torch.save(network.visual.state_dict(), self.folder / "tower.pt")
        torch.save(network.context_embedding.state_dict(), self.folder / "context.pt")
