"""Tensors that are computed once and kept on disk, under keys of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Callable, Mapping

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..media.files import atomic_file
from ..media.sources import open_source
from ..media.video import Video
from ..media.video_reading import MAX_BYTES
from .data import Item

logger = logging.getLogger(__name__)

_FORMAT = 1  # of what is kept: another number makes all be computed anew


class TensorCache:
    """A folder of safetensors files, each under the hash of its key.

    Entries appear when they are complete, so that several processes may use one folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def path(self, key: Mapping[str, Any]) -> Path:
        """Return where the entry of a key is, or would be."""
        text = json.dumps({**key, "format": _FORMAT}, sort_keys=True, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def store(self, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]) -> Path:
        """Return the path of a key's entry; if there is none, write what ``compute`` returns."""
        path = self.path(key)
        if not path.exists():
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
            with atomic_file(path) as temporary:
                save_file(tensors, temporary)
        return path

    def get(self, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return a key's tensors, computed if they are not there or cannot be read."""
        path = self.store(key, compute)
        try:
            return load_file(path)
        except SafetensorError as error:
            logger.warning("%s is damaged (%s) and is computed anew", path, error)
            path.unlink()
            return load_file(self.store(key, compute))


def content_hash(item: Item) -> str:
    """Return the SHA-256 of an item's file, or of its pixels.

    Raises:
        I2VError: if it cannot be read.
    """
    source, digest = item.source, hashlib.sha256()
    if isinstance(source, Video):
        digest.update(f"{source.frames.shape} {source.fps}".encode())
        digest.update(np.ascontiguousarray(source.frames).data)
    elif isinstance(source, (Image.Image, np.ndarray)):
        pixels = np.ascontiguousarray(source)
        digest.update(f"{pixels.shape} {pixels.dtype} {type(source).__name__}".encode())
        digest.update(pixels.data)
    else:
        with open_source(source, "video" if item.is_video else "image", MAX_BYTES) as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def file_identity(path: str | os.PathLike) -> list[Any]:
    """Return what tells a weights file from another: its name, size and time of change."""
    status = os.stat(path)
    return [Path(path).name, status.st_size, status.st_mtime_ns]
