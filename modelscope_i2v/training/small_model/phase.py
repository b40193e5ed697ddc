"""What a phase of the small model's training is: one network, its loss, and how it is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Generic, Mapping, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ...media.files import atomic_file

Network = TypeVar("Network", bound=nn.Module)


class Phase(Generic[Network]):
    """One network to train, its loss, and figures on scenes that it is not trained on.

    Args:
        folder: the run's: earlier phases' weights are read there, the phase's own are written.
    """

    network: Network
    steps: int
    rate: float
    rate_factors: Mapping[str, float] = {}
    average_decay = 0.998

    def __init__(self, folder: Path):
        self.folder = folder

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        raise NotImplementedError

    def evaluate(self, network: Network) -> dict[str, float]:
        return {}

    def save(self, network: Network) -> None:
        raise NotImplementedError


def to_tensor(frames: np.ndarray) -> Tensor:
    """[F, H, W, 3] uint8 to [F, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_shard(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a file that appears when it is complete."""
    with atomic_file(path) as partial:
        torch.save(dict(tensors), partial)


def psnr(images: Tensor, target: Tensor) -> float:
    """Mean PSNR of images in [-1, 1], clamped, in dB."""
    errors = (images.clamp(-1, 1) - target).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / errors)).mean().item()
