"""What a training step takes of memory, told before it is begun; and taking less."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..engine.memory.estimate import in_gigabytes
from ..models.blocks import ResidualBlock
from ..models.transformers import SpatialTransformer, TemporalTransformer
from ..models.unet import UNet
from ..settings.training import TrainingSettings

#: Bytes for each trained weight: of AdamW's two moments.
_MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2}

# Counted, by following every tensor of a step, on the published UNet with adapters: by type, and with
# checkpointing or without. In bytes for each of the latent's positions x the width of the finest level.
_STEP_BYTES = {
    (torch.bfloat16, True): 265, (torch.bfloat16, False): 2190,
    (torch.float16, True): 186, (torch.float16, False): 1860,
    (torch.float32, True): 314, (torch.float32, False): 2760,
}  # fmt: skip


def add_checkpointing(unet: nn.Module) -> None:
    """Keep only what goes into each of a UNet's blocks, and compute the rest again for the gradient."""
    for module in unet.modules():
        if isinstance(module, (ResidualBlock, SpatialTransformer, TemporalTransformer)):
            module.forward = functools.partial(  # type: ignore[method-assign]
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
            )


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes: of all weights, of the optimizer's moments and the average, and of a step's tensors."""

    weights: int
    optimizer: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.step

    def __str__(self) -> str:
        return (
            f"about {in_gigabytes(self.total)}: {in_gigabytes(self.weights)} of weights, "
            f"{in_gigabytes(self.optimizer)} of the optimizer's, {in_gigabytes(self.step)} in a step"
        )


def estimate_training_memory(
    unet: UNet, settings: TrainingSettings, latent: tuple[int, int, int], dtype: torch.dtype
) -> TrainingMemory:
    """Return what training takes, about, on the device where the UNet is.

    The stage's other networks are left out: they are elsewhere when steps are made.

    Args:
        unet: as it is trained, its frozen parameters needing no gradient.
        settings: the run's.
        latent: (F, h, w) of a clip's latents.
        dtype: of what is computed.
    """
    trained = sum(each.numel() for each in unet.parameters() if each.requires_grad)
    weights = sum(each.numel() * each.element_size() for each in unet.parameters())
    average = 4 * trained if settings.full and settings.ema_decay else 0
    frames, height, width = latent
    finest = settings.batch_size * frames * height * width * unet.config.dim * unet.config.dim_mult[0]
    step = _STEP_BYTES[dtype, settings.checkpointing] * finest
    gradients = 4 * trained
    # Where all weights are trained they are float32, and casts of them are kept during a step.
    casts = dtype.itemsize * trained if settings.full and dtype != torch.float32 else 0
    moments = _MOMENT_BYTES[settings.optimizer] * trained
    return TrainingMemory(weights, moments + average, step + gradients + casts)
