"""What both stages take of a GPU's memory in one process, one generating after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import torch

from .folders import prepare, read_settings
from .fresh import MIB, ProcessFailed, in_fresh_process
from .options import Options
from .ours import Ours
from .sizes import STAGE_NAMES, draw_case
from .timing import Missing, OwnRow, Samples

NAME = "both stages: peak device memory"


def both_stages_row(options: Options, report: Callable[[str], None]) -> OwnRow:
    """The peak at full speed, and beside it that of the setting ``low_memory``."""
    reason = "" if options.device.type == "cuda" else "needs a CUDA device"
    for stage in STAGE_NAMES:
        settings = read_settings(options.folder, stage)
        reason = reason or prepare(options.folder, settings, options.device, report)
    if reason:
        return OwnRow(NAME, Missing(reason), Missing(reason))
    return OwnRow(NAME, *(_peak(low_memory, options, report) for low_memory in (False, True)))


def _peak(low_memory: bool, options: Options, report: Callable[[str], None]) -> Samples | Missing:
    report(f"{NAME}, low_memory {low_memory}: in a new process")
    folder, device = str(options.folder.resolve()), str(options.device)
    try:
        mib = in_fresh_process(
            peak_device_mib, folder, device, options.precision, options.compile, low_memory
        )
    except ProcessFailed as error:
        return Missing(str(error))
    return Samples((mib,), "MiB")


def peak_device_mib(
    folder_name: str, device_name: str, precision: str, compile: bool, low_memory: bool
) -> float:
    """Load both stages, which share the autoencoder as in the pipeline, and run two steps of each."""
    folder, device = Path(folder_name), torch.device(device_name)
    cases = [draw_case(stage, read_settings(folder, stage)) for stage in STAGE_NAMES]
    first, second = (Ours(folder, case, device, precision, compile, low_memory) for case in cases)
    second.share_autoencoder(first)
    for side in (first, second):
        side.generate(steps=2)
    return torch.cuda.max_memory_allocated(device) / MIB
