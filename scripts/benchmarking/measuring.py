"""Seconds measured in turn, the memory of a fresh process, and words where there is no number."""

from __future__ import annotations

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence, Union

import torch
from torch.utils.benchmark import timer  # a clock that waits for the GPU first

MIB = 2**20


class Samples(NamedTuple):
    """The measurements of one side of a row; ``unit`` is s or MiB."""

    values: tuple[float, ...]
    unit: str = "s"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        def digits(value: float) -> str:  # about three, without an exponent
            return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.3f}"

        low, high = min(self.values), max(self.values)
        return f"{digits(self.median)} ({digits(low)}-{digits(high)}) {self.unit}"


class Missing(str):
    """Why there is no number."""

    def __str__(self) -> str:
        return f"- ({self[:]})"


Cell = Union[Samples, Missing]


class Row(NamedTuple):
    """Two sides of one measurement.

    ``difference`` is ||second - first|| / ||first|| of their outputs; ``psnr`` is in dB, of their videos.
    """

    name: str
    first: Cell
    second: Cell
    difference: float | None = None
    psnr: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times the second's median the first's is."""
        if isinstance(self.first, Missing) or isinstance(self.second, Missing) or not self.second.median:
            return None
        return self.first.median / self.second.median


def seconds(run: Callable[[], object]) -> float:
    """Seconds of one call. (torch's ``Timer`` would call it twice more each time, to warm up.)"""
    start = timer()
    run()
    return timer() - start


def in_turn(runs: Sequence[Callable[[], float]], repeats: int) -> list[Samples]:
    """Each run's results, taken one after the other and so again: what slows the machine slows them all."""
    rounds = [[run() for run in runs] for _ in range(repeats)]
    return [Samples(values) for values in zip(*rounds)]


class Enough(Exception):
    """Ends a generation whose rest is not measured."""


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """Return what a module's function returns in a new Python of as many threads; Missing if it fails."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except Exception as error:
            return Missing((str(error) or type(error).__name__).splitlines()[0])


def forget_peak() -> int:
    """Begin the peak anew; return the bytes that are resident now. Raises OSError where this is no Linux."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_bytes()


def peak_bytes() -> int:
    """The most bytes that this process has had resident since ``forget_peak``."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
