"""Loading a stage in a process of its own: seconds, peak host memory and, on a GPU, peak device memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

SIDES = ("stock", "ours")
_MIB = 2**20


class LoadingFailed(RuntimeError):
    """A side could not be loaded; the message is the last line of its process."""


def load_in_fresh_process(
    side: str, folder: Path, stage: int, device: torch.device, precision: str, compile: bool = False
) -> dict[str, float]:
    """Load one side's stage in a new Python.

    Returns:
        ``seconds`` of loading, without imports; ``host_mib``, the growth of the process to its peak;
        ``weights_mib``, what the loaded networks hold, wherever they are; and on CUDA ``device_mib``, the
        most that the device held in a generation of two steps.
    """
    threads = torch.get_num_threads()
    arguments = json.dumps([side, str(folder.resolve()), stage, str(device), precision, compile, threads])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", "benchmarking.loading", arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise LoadingFailed((result.stderr.strip() or f"ended with {result.returncode}").splitlines()[-1])
    return json.loads(result.stdout.splitlines()[-1])


def _peak_bytes() -> int:
    """The most memory this process has had resident since ``_forget_peak``."""
    try:
        # Not getrusage's: a child begins with its parent's peak there, on Linux.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    """Let the peak begin at what is resident now, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _measure(
    side: str, folder: Path, stage: int, device: torch.device, precision: str, compile: bool
) -> dict[str, float]:
    from .folders import read_settings
    from .ours import Ours
    from .sizes import draw_case
    from .stock import Stock, import_stock

    case = draw_case(stage, read_settings(folder, stage))
    if side == "stock":
        import_stock(stage, device)  # once before, so that imports are not part of loading
    if device.type == "cuda":
        torch.zeros(1, device=device)  # starts CUDA, likewise
    _forget_peak()
    before, start = _peak_bytes(), time.perf_counter()
    loaded: Any = (
        Stock(folder, case, device) if side == "stock" else Ours(folder, case, device, precision, compile)
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    measured = {"seconds": time.perf_counter() - start, "host_mib": (_peak_bytes() - before) / _MIB}
    measured["weights_mib"] = sum(each.nbytes for each in loaded.weights()) / _MIB
    if device.type == "cuda":
        loaded.generate(steps=2)
        measured["device_mib"] = torch.cuda.max_memory_allocated(device) / _MIB
    return measured


if __name__ == "__main__":
    _side, _folder, _stage, _device, _precision, _compile, _threads = json.loads(sys.argv[1])
    torch.set_num_threads(_threads)
    print(json.dumps(_measure(_side, Path(_folder), _stage, torch.device(_device), _precision, _compile)))
