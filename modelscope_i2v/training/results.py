"""What a run leaves: model folders, and videos that show how far it has come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ..engine.stage import Stage
from ..media.files import atomic_file
from ..media.video import Video
from ..settings.configuration import FILE_NAME, load_settings
from ..settings.training import TrainingSettings
from ..weights import find_checkpoint
from ..weights.conversion import convert_folder
from .data import Item, fitted, frames_of

ADAPTER = "adapter.safetensors"


def write_model(
    base: Path, stage: str, unet: nn.Module, folder: Path, origin: Mapping[str, Any] | None = None
) -> None:
    """Write a model folder in half precision: the base's configuration and weights, and another UNet.

    Args:
        base: the model folder that the UNet was trained from.
        stage: whose UNet it is.
        unet: on any device.
        folder: where an earlier one of the same base may be: then its UNet is replaced.
        origin: goes into the file's metadata.
    """
    if not (folder / FILE_NAME).exists():
        convert_folder(base, folder, "fp16", progress=False)
    path = find_checkpoint(folder, load_settings(folder, stage).ckpt_unet)
    metadata = {
        name: each if isinstance(each, str) else json.dumps(each) for name, each in (origin or {}).items()
    }
    halves = {name: each.detach().half().cpu().contiguous() for name, each in unet.state_dict().items()}
    with atomic_file(path) as temporary:
        save_file(halves, temporary, metadata={"format": "pt", **metadata})


def write_validation_videos(
    stage: Stage, items: Sequence[Item], settings: TrainingSettings, folder: Path
) -> list[Path]:
    """Generate a video of each item, by the training's seed, size, rate and length; return their paths.

    Stage one gets an item's first frame, stage two its video at half the size.
    """
    own = stage.settings
    frames, fps, size = settings.shape_of_clips(own)
    keywords: dict[str, Any] = {"seed": settings.seed, "resolution": size, "progress": False}
    paths = []
    for number, item in enumerate(items):
        source: Any
        if own.unet.image_conditioned:
            source = Image.fromarray(next(iter(frames_of(item, 1))))
            keywords = {**keywords, "max_frames": frames, "fps": fps}
        else:
            half = (max(size[0] // 2, 1), max(size[1] // 2, 1))
            source = Video(np.stack([fitted(each, half) for each in frames_of(item, frames)]), fps)
            keywords = {**keywords, "text": item.text}
        path = folder / f"{number}.mp4"
        folder.mkdir(parents=True, exist_ok=True)
        stage(source, **keywords).save(path)
        paths.append(path)
    return paths
