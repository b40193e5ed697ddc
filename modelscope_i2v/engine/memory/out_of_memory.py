"""When memory runs out: less at a time, and where nothing helps, an error that says what would fit."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from typing import Callable, Iterable, Iterator, TypeVar

import torch

from ...errors import NotEnoughMemoryError, is_out_of_memory
from ...settings.request import Request
from ...settings.stages import StageSettings
from ...weights.loading import precision_name
from ..precision import select_dtype
from .estimate import estimate_memory, in_gigabytes

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class OutOfMemory(Exception):
    """Not even the least amount at a time went through. Its cause is torch's own error."""


def with_less_at_a_time(
    work: Callable[[int], Result], amounts: Iterable[int], words: str, device: torch.device
) -> Result:
    """The result of ``work(amount)`` for the first of some amounts that there is memory for.

    Args:
        work: gives the same result whatever the amount.
        amounts: descending.
        words: for the log: what is done, with ``{}`` for the amount.
        device: whose memory it is.

    Raises:
        OutOfMemory: if the last amount is too much.
    """
    cause: BaseException | None = None
    for amount in amounts:
        if cause is not None:
            _release(device)
            logger.warning("out of memory on %s: trying again, %s", device, words.format(f"{amount:,}"))
        try:
            return work(amount)
        except (OutOfMemory, MemoryError, RuntimeError) as error:
            if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
                raise
            # Without its traceback, whose frames would keep what was computed so far.
            cause = error.with_traceback(None)
    raise OutOfMemory(str(cause)) from cause


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def not_enough(
    settings: StageSettings, request: Request, frames: int, phase: str, device: torch.device, low_memory: bool
) -> NotEnoughMemoryError:
    """The error for a generation of so many frames that ran out of memory in a phase.

    It says how much is needed, how much there is, and which settings would fit.
    """
    settings = replace(settings, precision=precision_name(select_dtype(settings.precision, device)))
    window = min(request.window, frames)
    needed = estimate_memory(settings, request.size, frames, window, low_memory)
    there, total = _memory(device)
    parts = [
        f"{request.stage}, {phase}: out of memory on {device}, even with the least at a time: "
        f"{request.size[0]}x{request.size[1]} with {window} frames at a time need about "
        f"{in_gigabytes(needed.networks)}"
    ]
    if there is None:
        return NotEnoughMemoryError(f"{parts[0]}. {_CHANGES}")
    parts.append(f", {in_gigabytes(there)} of {in_gigabytes(total)} can be had")
    fitting = [
        f"{words} ({in_gigabytes(estimate)})"
        for words, estimate in _alternatives(settings, request, frames, low_memory)
        if estimate <= there
    ]
    ends = f". These would fit: {'; '.join(fitting[:4])}" if fitting else f". {_CHANGES}"
    return NotEnoughMemoryError("".join(parts) + ends)


_CHANGES = "low_memory true, fewer frames at a time (chunk_size) or a smaller resolution need less"


def _alternatives(
    settings: StageSettings, request: Request, frames: int, low_memory: bool
) -> Iterator[tuple[str, int]]:
    """Settings that need less, the smallest change first, with their bytes."""
    width, height = request.size
    window = min(request.window, frames)
    choices = [] if low_memory else [("low_memory true", (width, height), window)]
    with_low = "" if low_memory else "low_memory true and "
    name = "max_frames" if request.stage == "image-to-video" else "chunk_size"
    for part in (window // 2, window // 4):
        choices += [(f"{with_low}{name} {part}", (width, height), part)] if part else []
    for divisor in (2, 4):
        size = max(width // divisor // 8 * 8, 8), max(height // divisor // 8 * 8, 8)
        choices.append((f"{with_low}resolution {list(size)}", size, window))
    for words, size, part in choices:
        yield words, estimate_memory(settings, size, frames, part, low_memory=True).networks


def _memory(device: torch.device) -> tuple[int | None, int]:
    """Bytes that can be had on a device, with what is cached or used by this process's networks, and all."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device), total
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            entries = dict(line.split(":", 1) for line in file)
    except OSError:
        return None, 0
    kibibytes = {name: int(entries[name].split()[0]) for name in ("MemAvailable", "MemTotal")}
    return kibibytes["MemAvailable"] * 1024, kibibytes["MemTotal"] * 1024
