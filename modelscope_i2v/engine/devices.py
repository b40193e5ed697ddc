"""Where networks are: on the stage's device, or in low-memory mode there only while they work."""

from __future__ import annotations

import gc
import re
from contextlib import contextmanager
from typing import Iterator

import torch
from torch import nn

from ..errors import InvalidInputError


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device that a caller names; by default a GPU where there is one.

    ``gpu`` and ``gpu:N`` are ModelScope's words for CUDA devices.

    Raises:
        InvalidInputError: if torch knows no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(re.sub(r"^gpu", "cuda", device) if isinstance(device, str) else device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInputError(
            f"device: got {device!r}, allowed are cpu, cuda, cuda:N and torch's other devices"
        ) from error


def device_of(network: nn.Module) -> torch.device:
    """Return the device of a network's parameters."""
    return next(network.parameters()).device


@contextmanager
def placed_on(network: nn.Module, device: torch.device, low_memory: bool) -> Iterator[torch.device]:
    """Keep a network on ``device`` for a block in low-memory mode, and move it back after it.

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
            torch.cuda.empty_cache()  # for the next network


def release_memory() -> None:
    """Free the memory that a stage held, for the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
