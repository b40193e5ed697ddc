"""CLIP's embeddings of pictures and frames, by the image tower of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable

import numpy as np
import torch
from PIL import Image

from ..errors import ConfigurationError
from ..media.preprocessing import ClipImageTransform
from ..models.clip import ClipImageEncoder
from ..settings.configuration import FILE_NAME, load_settings, read_configuration, stages_in
from ..weights import find_checkpoint, load_weights
from .devices import resolve_device


class ImageEmbedder:
    """The image tower of a model folder's CLIP, of either stage, in float32, with its transform."""

    def __init__(self, folder: str | Path, device: str | torch.device | None = None):
        """Load the tower.

        Args:
            folder: holds ``configuration.json`` and CLIP's file.
            device: such as ``cpu`` or ``cuda:0``; by default a GPU where there is one.

        Raises:
            ConfigurationError, MissingFileError, CheckpointError, NotEnoughMemoryError: if it cannot be.
        """
        stages = stages_in(read_configuration(folder))
        if not stages:
            raise ConfigurationError(f"{Path(folder) / FILE_NAME}: describes no stage of this package")
        settings = load_settings(folder, stages[0])
        with torch.device("meta"):
            self.tower = ClipImageEncoder(settings.clip)
        path, ignored = find_checkpoint(folder, settings.ckpt_clip), self.tower.full_model_keys
        home = resolve_device(device)
        load_weights(self.tower.model, path, ignore=ignored, device=home, dtype=torch.float32)
        self.tower.eval()
        self.transform = ClipImageTransform(settings.clip.image_size)

    @torch.no_grad()
    def __call__(self, pictures: Iterable[Image.Image | np.ndarray]) -> np.ndarray:
        """Return the embeddings [N, D], float32, of RGB images or uint8 arrays [H, W, 3] of any size."""
        images = (each if isinstance(each, Image.Image) else Image.fromarray(each) for each in pictures)
        return torch.cat([self.tower(self.transform(each)[None]).cpu() for each in images]).numpy()
