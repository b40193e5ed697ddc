"""What a training step takes of memory, counted before it is begun; and taking less."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from ..engine.memory.estimate import in_gigabytes
from ..models.blocks import ResidualBlock
from ..models.config import UNetConfig
from ..models.transformers import SpatialTransformer, TemporalTransformer
from ..models.unet import UNet
from ..settings.training import TrainingSettings
from .lora import add_lora

#: Bytes for each trained weight: of AdamW's two moments.
_MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2}


def add_checkpointing(unet: nn.Module) -> None:
    """Keep only what goes into each of a UNet's blocks, and compute the rest again for the gradient."""
    for module in unet.modules():
        if isinstance(module, (ResidualBlock, SpatialTransformer, TemporalTransformer)):
            module.forward = functools.partial(  # type: ignore[method-assign]
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
            )


class LiveMemory(TorchDispatchMode):
    """``peak``: the most bytes that were held at once by what was computed in the block, weights left out."""

    def __init__(self, *networks: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for network in networks:
            self._seen.update({each.untyped_storage(): True for each in network.parameters()})

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


class _FusedAttention(torch.autograd.Function):
    """What a fused attention keeps of memory; the meta device would write out all scores."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        sums = q.new_empty(q.shape[:3], dtype=torch.float32)
        context.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        return tuple(torch.empty_like(each) for each in context.saved_tensors[:3])


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes: of all weights, of the optimizer's moments and the average, and of a step's tensors."""

    weights: int
    optimizer: int
    step: int
    trained: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.step

    def __str__(self) -> str:
        return (
            f"about {in_gigabytes(self.total)}: {in_gigabytes(self.weights)} weights, "
            f"{in_gigabytes(self.optimizer)} for the optimizer, {in_gigabytes(self.step)} in a step; "
            f"{self.trained:,} weights are trained"
        )


def estimate_training_memory(
    config: UNetConfig, settings: TrainingSettings, latent: tuple[int, int, int], dtype: torch.dtype
) -> TrainingMemory:
    """Return what training takes on its device, by following every tensor of a step that computes nothing.

    The other networks are left out: they are not on the device when steps are made.

    Args:
        config: the UNet's.
        settings: the run's.
        latent: (F, h, w) of a clip's latents.
        dtype: of what is computed.
    """
    with torch.device("meta"):
        unet = UNet(config, _FusedAttention.apply).to(dtype)
    if not settings.full:
        unet.requires_grad_(False)
        add_lora(unet, settings.lora)
        unet.to("meta")  # where adapters are not made
    if settings.checkpointing:
        add_checkpointing(unet)
    trained = [each for each in unet.parameters() if each.requires_grad]
    count = sum(each.numel() for each in trained)
    # All weights that are trained are float32, and so are their gradients; casts of them are kept in a step.
    extra = count * (4 - dtype.itemsize) if settings.full else 0
    casts = count * dtype.itemsize if settings.full and dtype != torch.float32 else 0
    with LiveMemory(unet) as memory:
        _step_of(unet, settings.batch_size, latent)
    weights = sum(each.numel() * each.element_size() for each in unet.parameters()) + extra
    average = 4 * count if settings.full and settings.ema_decay else 0
    moments = _MOMENT_BYTES[settings.optimizer] * count
    return TrainingMemory(weights, moments + average, memory.peak + extra + casts, count)


def _step_of(unet: UNet, batch: int, latent: tuple[int, int, int]) -> None:
    config = unet.config
    x = torch.empty(batch, config.in_dim, *latent, device="meta")
    t = torch.zeros(batch, device="meta")
    y = torch.empty(batch, 1 if config.image_conditioned else 77, config.y_dim, device="meta")
    unet(x, t, y).float().square().mean().backward()
