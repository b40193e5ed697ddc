"""Loading a stage in a process of its own: seconds, peak host memory and, on a GPU, peak device memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from .folders import read_settings
from .fresh import MIB, forget_peak, in_fresh_process, peak_bytes
from .ours import Ours
from .sizes import draw_case
from .stock import Stock, import_stock

SIDES = ("stock", "ours")


def load_in_fresh_process(
    side: str, folder: Path, stage: int, device: torch.device, precision: str, compile: bool = False
) -> dict[str, float]:
    """Load one side's stage in a new Python.

    Returns:
        ``seconds`` of loading, without imports; ``host_mib``, the growth of the process to its peak;
        ``weights_mib``, what the loaded networks hold, wherever they are; and on CUDA ``device_mib``, the
        most that the device held in a generation of two steps.

    Raises:
        ProcessFailed: it cannot be loaded.
    """
    return in_fresh_process(_measure, side, str(folder.resolve()), stage, str(device), precision, compile)


def _measure(
    side: str, folder_name: str, stage: int, device_name: str, precision: str, compile: bool
) -> dict[str, float]:
    folder, device = Path(folder_name), torch.device(device_name)
    case = draw_case(stage, read_settings(folder, stage))
    if side == "stock":
        import_stock(stage, device)  # once before, so that imports are not part of loading
    if device.type == "cuda":
        torch.zeros(1, device=device)  # starts CUDA, likewise
    forget_peak()
    before, start = peak_bytes(), time.perf_counter()
    loaded: Any = (
        Stock(folder, case, device) if side == "stock" else Ours(folder, case, device, precision, compile)
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    measured = {"seconds": time.perf_counter() - start, "host_mib": (peak_bytes() - before) / MIB}
    measured["weights_mib"] = sum(each.nbytes for each in loaded.weights()) / MIB
    if device.type == "cuda":
        loaded.generate(steps=2)
        measured["device_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return measured
