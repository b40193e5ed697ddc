"""What a user sees of a generation: a bar a stage, and the seconds of each phase."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from ..settings.request import Request, StepCallback


class PhaseClock:
    """Seconds spent in each phase of one generation, in order."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._within = 0.0  # seconds of the phases inside the present one

    @contextmanager
    def phase(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Times a block, phases inside it left out; with a CUDA ``device``, until its work is done."""
        outside, self._within = self._within, 0.0
        start = time.perf_counter()
        yield
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + took - self._within
        self._within = outside + took

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())


@contextmanager
def stepping(request: Request, steps: int) -> Iterator[StepCallback]:
    """Shows a bar on stderr, and gives the samplers' callback, which moves it and calls the request's.

    The bar is shown only on a terminal, unless the request says otherwise.
    """
    hidden = None if request.progress is None else not request.progress
    with tqdm(total=steps, desc=request.stage, disable=hidden) as bar:

        def stepped(step: int, timestep: float, x: Tensor) -> None:
            bar.update()
            if request.callback is not None:
                request.callback(step, timestep, x)

        yield stepped
