"""Frames that do not fit into memory as wholes: in which tiles they do, known before any work."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Iterator

import torch

from ...models.config import UNetConfig
from ...settings.request import Request
from ...settings.stages import StageSettings
from .estimate import estimate_memory, in_gigabytes
from .out_of_memory import _memory

logger = logging.getLogger(__name__)

#: Sides of tiles in pixels that are tried where a frame does not fit: seams grow as they become smaller.
TILE_SIZES = (1280, 1024, 768, 512, 384, 256)


@dataclass
class TileLimit:
    """The side of the tiles in which frames go through the UNet, which becomes less when memory runs out.

    Attributes:
        size: of tiles in pixels; None for whole frames.
        overlap: in pixels; None for a quarter.
    """

    size: int | None = None
    overlap: int | None = None

    def and_less(self, frame: int) -> Iterator[int]:
        """Yield the present size and smaller ones; for whole frames the longer side, ``frame``."""
        present = self.size or frame
        yield present
        yield from (size for size in TILE_SIZES if size < min(present, frame))

    def layout(self, size: int, unet: UNetConfig, scale: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return a tile's (rows, columns) of latents, as the UNet takes them, and those that two share."""
        rows, columns = unet.padded_size(-(-size // scale), -(-size // scale))
        overlap = size // 4 if self.overlap is None else min(self.overlap, size - 1)
        shared = -(-overlap // scale)
        return (rows, columns), (min(shared, rows - 1), min(shared, columns - 1))


def fitting_tile(
    settings: StageSettings, request: Request, device: torch.device, low_memory: bool
) -> int | None:
    """Return the side in pixels of the largest tiles that there is memory for, None if whole frames fit.

    If none fits, the smallest: the estimate may be wrong.
    """
    there, _ = _memory(device)
    if there is None or max(request.size) <= min(TILE_SIZES):
        return None

    def needed(tile: int | None) -> int:
        # Frames are counted at one at a time where that helps: out of memory, fewer are decoded.
        one = replace(settings, decoder_bs=1)
        window = request.window
        estimate = estimate_memory(one, request.size, window, window, low_memory, tile)
        return estimate.networks if device.type == "cuda" else estimate.activations

    whole = needed(None)
    if whole <= there:
        return None
    sizes = [size for size in TILE_SIZES if size < max(request.size)]
    chosen = next((size for size in sizes if needed(size) <= there), sizes[-1])
    logger.warning(
        "%s: frames of %dx%d go through the networks in tiles of %d pixels: whole ones need about %s, and %s "
        "can be had", request.stage, *request.size, chosen, in_gigabytes(whole), in_gigabytes(there),
    )  # fmt: skip
    return chosen
