"""Where a stage's networks are: all on the device, or in low-memory mode each only while it works."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import Iterator

import torch
from torch import nn

from ...settings.configuration import StageSettings
from .estimate import estimate_memory

logger = logging.getLogger(__name__)


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters are."""
    return next(network.parameters()).device


def choose_low_memory(settings: StageSettings, device: torch.device) -> bool:
    """Whether a stage's networks take turns on the device: as set, or with ``auto`` if all do not fit."""
    if settings.low_memory != "auto":
        return settings.low_memory
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    frames = settings.max_frames
    needed = estimate_memory(settings, settings.frame_size, frames, frames).networks
    if needed > free:
        gib = 2**30
        logger.warning(
            "%s: low-memory mode: keeping all networks on %s needs about %.1f GiB, and %.1f GiB are free",
            settings.stage, device, needed / gib, free / gib,
        )  # fmt: skip
    return needed > free


@contextmanager
def at_work(network: nn.Module, device: torch.device, low_memory: bool) -> Iterator[torch.device]:
    """A network's turn: in low-memory mode it is on ``device`` for the block, and then back where it was.

    Otherwise it works where it is, wherever its owner moved it.

    Yields:
        The device that it works on.
    """
    home = device_of(network)
    if not low_memory or home == device:
        yield home
        return
    network.to(device)
    try:
        yield device
    finally:
        network.to(home)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for the next one's turn
