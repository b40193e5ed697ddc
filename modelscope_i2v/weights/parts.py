"""The three networks that a stage is made of, and where in which file the weights of each are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.attention import AttentionFunction, sdpa_attention
from ..models.autoencoder import Autoencoder
from ..models.clip import ClipImageEncoder, ClipTextEncoder
from ..models.unet import UNet
from ..settings.stages import StageSettings
from . import find_checkpoint


@dataclass(frozen=True)
class Part:
    """A network on the meta device, to be loaded from ``path``, which ``setting`` names.

    ``weights`` is the module whose parameters the file names, below ``prefix``; it may hold those of
    ``ignored`` besides.
    """

    setting: str
    path: Path
    network: nn.Module
    weights: nn.Module
    prefix: str = ""
    ignored: frozenset[str] = frozenset()


def stage_parts(
    settings: StageSettings, folder: str | Path, attend: AttentionFunction = sdpa_attention
) -> dict[str, Part]:
    """A stage's parts by the names that its model has for them, none of them loaded.

    Raises:
        MissingFileError: if one of the files is not there.
    """
    tower = ClipImageEncoder if settings.unet.image_conditioned else ClipTextEncoder
    with torch.device("meta"):
        clip_encoder, autoencoder = tower(settings.clip), Autoencoder(settings.autoencoder)
        unet = UNet(settings.unet, attend)

    def part(setting: str, network: nn.Module, weights: nn.Module, **details: Any) -> Part:
        path = find_checkpoint(folder, getattr(settings, setting))
        return Part(setting, path, network, weights, **details)

    keys = clip_encoder.full_model_keys  # CLIP's file holds both towers; the stage needs one
    return {
        "clip_encoder": part("ckpt_clip", clip_encoder, clip_encoder.model, ignored=keys),
        "autoencoder": part("ckpt_autoencoder", autoencoder, autoencoder, prefix="first_stage_model."),
        "unet": part("ckpt_unet", unet, unet),
    }
