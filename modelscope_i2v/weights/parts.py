"""The three networks that a stage is made of, and where in which file the weights of each are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    """A network on the meta device, to be loaded from ``path``.

    ``weights`` is the module whose parameters the file names, below ``prefix``; it may hold those of
    ``ignored`` besides.
    """

    network: nn.Module
    weights: nn.Module
    path: Path
    prefix: str = ""
    ignored: frozenset[str] = frozenset()


def stage_parts(
    settings: StageSettings, folder: str | Path, attend: AttentionFunction = sdpa_attention
) -> dict[str, Part]:
    """A stage's parts by the names that its model has for them, none of them loaded.

    Raises:
        MissingFileError: if one of the files is not there.
    """
    files = {
        name: find_checkpoint(folder, getattr(settings, name))
        for name in ("ckpt_clip", "ckpt_autoencoder", "ckpt_unet")
    }
    tower = ClipImageEncoder if settings.unet.image_conditioned else ClipTextEncoder
    with torch.device("meta"):
        clip_encoder, autoencoder = tower(settings.clip), Autoencoder(settings.autoencoder)
        unet = UNet(settings.unet, attend)
    return {
        # CLIP's file holds both towers; the stage needs one.
        "clip_encoder": Part(
            clip_encoder, clip_encoder.model, files["ckpt_clip"], ignored=clip_encoder.full_model_keys
        ),
        "autoencoder": Part(autoencoder, autoencoder, files["ckpt_autoencoder"], prefix="first_stage_model."),
        "unet": Part(unet, unet, files["ckpt_unet"]),
    }
