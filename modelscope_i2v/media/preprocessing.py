"""From pictures to what the networks take: stage one's CLIP image, stage two's frames."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CROP_SIZE = 448  # side of the square that stage one sees of its image, before CLIP's size
_MAX_RESIZED_PIXELS = 50_000_000
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def center_crop(image: Image.Image, side: int = CROP_SIZE) -> Image.Image:
    """The central square of an image, its shorter side scaled to ``side`` with a box filter."""
    scale = min(image.width, image.height) / side
    # Rounding can bring the shorter side just below the crop's, which would then have a black row.
    width, height = (max(int(length // scale), side) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    if width * height > _MAX_RESIZED_PIXELS:
        # A long strip: of its rows and columns, only those of the crop are resized.
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + side) * across, (top + side) * down)
        return image.resize((side, side), resample=Image.Resampling.BOX, box=box)
    image = image.resize((width, height), resample=Image.Resampling.BOX)
    return image.crop((left, top, left + side, top + side))


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """[3, H, W] in [0, 1] of an RGB image, or of [H, W, 3] uint8."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255


class ClipImageTransform:
    """An RGB image to CLIP's input [3, size, size]: centre crop, bilinear resize, CLIP's statistics."""

    def __init__(self, size: int = 224):
        self.size = size

    def __call__(self, image: Image.Image) -> Tensor:
        image = center_crop(image).resize((self.size, self.size), resample=Image.Resampling.BILINEAR)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return (to_tensor(image) - mean) / std


class VideoTransform:
    """RGB frames, as images or [F, H, W, 3] uint8, to [F, 3, H, W] in [-1, 1]."""

    def __call__(self, frames: np.ndarray | list[Image.Image]) -> Tensor:
        return torch.stack([to_tensor(frame) for frame in frames]) * 2 - 1


def to_frames(video: Tensor, deep: bool = False) -> np.ndarray:
    """Frames [F, H, W, 3] uint8 of a video [3, F, H, W] in about [-1, 1], truncated as published.

    With ``deep`` they are uint16, rounded.
    """
    video = (video.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)
    if deep:
        return (video * 65535).round().to(torch.int32).cpu().numpy().astype(np.uint16)
    return (video * 255).to(torch.uint8).cpu().numpy()
