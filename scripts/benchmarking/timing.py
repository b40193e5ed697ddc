"""Measuring: seconds on any device, two sides in turn, and what is said where there is no number."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Callable, Sequence

import torch


@dataclass(frozen=True)
class Samples:
    """The measurements of one side of a row; ``unit`` is s or MiB."""

    values: tuple[float, ...]
    unit: str = "s"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{_digits(self.median)} ({_digits(low)}-{_digits(high)}) {self.unit}"


def _digits(value: float) -> str:
    """About three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 1 else f"{value:.3f}"


@dataclass(frozen=True)
class Missing:
    """There is no number, and why."""

    reason: str

    def __str__(self) -> str:
        return f"- ({self.reason})"


@dataclass(frozen=True)
class Row:
    """One line of the table. ``difference`` is of the outputs: ||ours - stock|| / ||stock||."""

    name: str
    stock: Samples | Missing
    ours: Samples | Missing
    difference: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times ours the stock implementation takes, by the medians."""
        if isinstance(self.stock, Missing) or isinstance(self.ours, Missing) or not self.ours.median:
            return None
        return self.stock.median / self.ours.median


@dataclass(frozen=True)
class OwnRow:
    """One line of a table that has ours on both sides, which need not compute the same.

    ``difference`` is ||measured - reference|| / ||reference|| of the videos, ``psnr`` in dB.
    """

    name: str
    reference: Samples | Missing
    measured: Samples | Missing
    difference: float | None = None
    psnr: float | None = None

    @property
    def gain(self) -> float | None:
        """How many times what is measured the reference takes, by the medians."""
        return Row(self.name, self.reference, self.measured).ratio


class Enough(Exception):
    """Ends a generation whose rest is not measured."""


class Stopwatch:
    """Seconds between ``start`` and ``stop``, in which the device finishes what it was given."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0

    def start(self) -> None:
        synchronize(self.device)
        self.seconds = -time.perf_counter()

    def stop(self) -> None:
        synchronize(self.device)
        self.seconds += time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    watch = Stopwatch(device)
    watch.start()
    run()
    watch.stop()
    return watch.seconds


def in_turn(
    stock: Callable[[], float], ours: Callable[[], float], repeats: int, warm_up: bool = True
) -> tuple[Samples, Samples]:
    """Both sides' seconds, measured stock, ours, stock, ours, ...: what slows the machine slows both.

    Args:
        stock, ours: do the work once and return its seconds.
        repeats: how often each is measured.
        warm_up: let each do the work once unmeasured before.
    """
    if warm_up:
        stock()
        ours()
    of_stock, of_ours = in_rounds([stock, ours], repeats)
    return of_stock, of_ours


def in_rounds(runs: Sequence[Callable[[], float]], repeats: int) -> list[Samples]:
    """The seconds of each, measured one after the other, and so again ``repeats`` times."""
    rounds = [[run() for run in runs] for _ in range(repeats)]
    return [Samples(values) for values in zip(*rounds)]
