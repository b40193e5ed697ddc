"""Clips as the UNet sees them, latents and conditions, computed once by a stage's other networks."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from ..engine.devices import device_of, placed_on
from ..engine.latents import encode_frames, latent_size
from ..engine.stage import Stage
from ..errors import InvalidInputError, MissingFileError
from ..media.preprocessing import ClipImageTransform, VideoTransform
from ..settings.training import TrainingSettings
from ..weights import find_checkpoint
from .cache import TensorCache, content_hash, file_identity
from .data import (
    Clip,
    Item,
    clip_of_image,
    clips_of_video,
    fitted,
    frames_of,
    nearest_size,
    probe,
    sizes_near,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedClip:
    """A clip whose latents and condition are in files."""

    clip: Clip
    name: str
    text: str
    files: tuple[Path, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Return ``mean`` and ``logvar`` [C, F, h, w] of the posterior, and the condition ``y`` [N, D]."""
        return {name: tensor for path in self.files for name, tensor in load_file(path).items()}


class Encoder:
    """Encodes items with a stage's networks, which it keeps on ``device`` while it does.

    Args:
        stage: the engine's; its autoencoder and CLIP tower are used, its UNet is not.
        settings: which clips are wanted.
        cache: where they are kept.
        device: where they are computed.
    """

    def __init__(self, stage: Stage, settings: TrainingSettings, cache: TensorCache, device: torch.device):
        self.stage, self.cache, self.device = stage, cache, device
        own = stage.settings
        self.frames, self.fps, size = settings.shape_of_clips(own)
        self.most = settings.clips
        self.sizes = sizes_near(size, own.unet, own.autoencoder.downscale)
        files = (find_checkpoint(stage.folder, name) for name in (own.ckpt_autoencoder, own.ckpt_clip))
        self._identity = {
            "stage": stage.name,
            "weights": [file_identity(path) for path in files],
            "dtype": str(stage.autoencoder.quant_conv.weight.dtype),
        }
        self._in_clip_tower = own.unet.image_conditioned

    @torch.no_grad()
    def encode(self, items: Iterable[Item], progress: bool | None = None) -> list[EncodedClip]:
        """Return the clips of all items that can be read; a warning names each that cannot.

        Raises:
            InvalidInputError: if there are none.
        """
        items = list(items)
        clips = self.encode_share(items, progress)
        if not clips:
            raise InvalidInputError(f"data: none of {len(items)} videos and images can be read")
        return clips

    @torch.no_grad()
    def encode_share(self, items: Sequence[Item], progress: bool | None = None) -> list[EncodedClip]:
        """Return the clips of some of the items, of which there may be none."""
        clips = []
        hidden = None if progress is None else not progress
        with ExitStack() as stack:
            for network in (self.stage.autoencoder, self.stage.clip_encoder):
                stack.enter_context(placed_on(network, self.device, True))
            for item in tqdm(items, desc="preparing", unit="file", disable=hidden):
                try:
                    clips += self._encode_item(item)
                except (InvalidInputError, MissingFileError) as error:
                    logger.warning("%s is left out: %s", item.name, error)
        return clips

    @torch.no_grad()
    def encode_text(self, text: str) -> Tensor:
        """Return the hidden states [N, D] of a text, stage two's condition."""
        return self.cache.get(self._text_key(text), lambda: {"y": self._text(text)})["y"]

    def _encode_item(self, item: Item) -> list[EncodedClip]:
        content = content_hash(item)
        clips = self._clips(item, content)
        keys = [{**self._identity, "content": content, "clip": vars(clip)} for clip in clips]
        files = {clip: self.cache.path(key) for clip, key in zip(clips, keys)}
        missing = [clip for clip in clips if not files[clip].exists()]
        for clip, frames in _read_clips(item, missing):
            self.cache.store(keys[clips.index(clip)], partial(self._latents, clip, frames))
        texts: tuple[Path, ...] = ()
        if not self._in_clip_tower:
            prompt = item.text + self.stage.settings.positive_prompt  # type: ignore[attr-defined]
            texts = (self.cache.store(self._text_key(prompt), lambda: {"y": self._text(prompt)}),)
        return [
            EncodedClip(clip, item.name, item.text, (files[clip], *texts))
            for clip in clips
            if files[clip].exists()
        ]

    def _clips(self, item: Item, content: str) -> list[Clip]:
        most = self.most * self.frames * 240  # no rate is divided by more
        key = {"probe": content, "most": most}
        found = self.cache.get(key, lambda: {"probe": _as_tensor(*probe(item, most))})["probe"].tolist()
        count, rate, width, height = found
        size = nearest_size((int(width), int(height)), self.sizes)
        if not item.is_video:
            return [clip_of_image(size, self.fps)]
        return clips_of_video(int(count), rate, size, self.frames, self.fps, self.most)

    def _latents(self, clip: Clip, frames: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Return a clip's entry: the posterior in half precision and, in stage one, the condition."""
        own = self.stage.settings
        pixels = (VideoTransform()(fitted(frame, clip.size)[None])[0] for frame in frames)
        shape = latent_size(clip.size, own.unet, own.autoencoder.downscale)
        posterior = encode_frames(self.stage.autoencoder, pixels, clip.size, shape)
        entry = {
            "mean": rearrange(posterior.mean, "f c h w -> c f h w").half(),
            "logvar": rearrange(posterior.logvar, "f c h w -> c f h w").half(),
        }
        if self._in_clip_tower:
            picture = ClipImageTransform(own.clip.image_size)(Image.fromarray(frames[0]))
            entry["y"] = self.stage.clip_encoder(picture[None].to(device_of(self.stage.clip_encoder)))
        return entry

    def _text_key(self, text: str) -> dict[str, Any]:
        return {**self._identity, "text": text}

    def _text(self, text: str) -> Tensor:
        with placed_on(self.stage.clip_encoder, self.device, True):
            return self.stage.clip_encoder(text)[0]


def _as_tensor(count: int, rate: float, size: tuple[int, int]) -> Tensor:
    return torch.tensor([count, rate, *size], dtype=torch.float64)


def _read_clips(item: Item, clips: Sequence[Clip]) -> Iterator[tuple[Clip, list[np.ndarray]]]:
    """Yield each clip with its frames, uint8 RGB, reading the item once."""
    if not clips:
        return
    numbers = {clip: range(clip.start, clip.start + clip.frames * clip.stride, clip.stride) for clip in clips}
    last = max(each[-1] for each in numbers.values())
    found: dict[Clip, list[np.ndarray]] = {clip: [] for clip in clips}
    for number, frame in enumerate(frames_of(item, last + 1)):
        for clip in [clip for clip in found if number in numbers[clip]]:
            found[clip].append(frame)
            if len(found[clip]) == clip.frames:
                yield clip, found.pop(clip)


def draw_clips(
    clips: Sequence[EncodedClip], count: int, image_share: float, generator: torch.Generator
) -> list[EncodedClip]:
    """Draw clips of one bucket: an image's with probability ``image_share``, where there are both.

    The first is drawn among all of its kind, the others among those of its bucket.
    """

    def draw(among: Sequence[EncodedClip]) -> EncodedClip:
        return among[int(torch.randint(len(among), (), generator=generator))]

    images = [each for each in clips if each.clip.frames == 1]
    videos = [each for each in clips if each.clip.frames > 1]
    share = torch.rand((), generator=generator).item()
    first = draw((images if share < image_share else videos) if images and videos else clips)
    bucket = [each for each in clips if each.clip.bucket == first.clip.bucket]
    return [first, *(draw(bucket) for _ in range(count - 1))]
