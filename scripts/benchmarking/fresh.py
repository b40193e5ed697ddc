"""Measuring in a process of its own: functions that run in a new Python, and the memory that it takes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import torch

MIB = 2**20


class ProcessFailed(RuntimeError):
    """There is no measurement; the message is the last line of the process."""


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """What a function of one of these modules returns in a new Python, with this one's number of threads.

    Args:
        function: found there by its name.
        *arguments: such as JSON has, and so is what it returns.

    Raises:
        ProcessFailed: it ended with an error.
    """
    call = json.dumps([function.__module__, function.__name__, torch.get_num_threads(), arguments])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", __name__, call]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise ProcessFailed((result.stderr.strip() or f"ended with {result.returncode}").splitlines()[-1])
    return json.loads(result.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """The most memory this process has had resident since ``forget_peak``."""
    try:
        # Not getrusage's: a child begins with its parent's peak there, on Linux.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> bool:
    """Let the peak begin at what is resident now. Returns whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    _module, _name, _threads, _arguments = json.loads(sys.argv[1])
    torch.set_num_threads(_threads)
    print(json.dumps(getattr(importlib.import_module(_module), _name)(*_arguments)))
