"""What a user sees of a generation: a bar, the seconds of each phase, and a callback after each step."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import Any, Callable, Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import Interrupted

#: Called after each step with (step, timestep or noise level, latents [B, 4, F, h, w]).
StepCallback = Callable[[int, float, Tensor], None]


class Progress:
    """The progress of one generation.

    Args:
        callback: called after each step; it ends the generation by raising StopIteration.
        bar: whether to show a bar on stderr; by default on a terminal and in a notebook.

    Attributes:
        seconds: by phase, in the order of their beginning; phases inside a phase count for themselves.
        estimate: the latest step's denoised estimate [B, 4, F, h, w], for whoever draws it meanwhile.
    """

    def __init__(self, callback: StepCallback | None = None, bar: bool | None = None):
        self.callback, self.bar = callback, bar
        self.seconds: dict[str, float] = {}
        self.estimate: Tensor | None = None
        self._inner_seconds = 0.0

    @contextmanager
    def phase(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Time a block; with a CUDA ``device``, until its work is done."""
        outer_seconds, self._inner_seconds = self._inner_seconds, 0.0
        start = time.perf_counter()
        yield
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._inner_seconds
        self._inner_seconds = outer_seconds + elapsed

    @contextmanager
    def steps(self, description: str, total: int, done: int = 0) -> Iterator[StepCallback]:
        """Show a bar of ``total`` steps for a block, of which so many are done.

        Yields:
            The samplers' callback. It moves the bar and calls the caller's callback.

        Raises:
            Interrupted: if the caller's callback raises StopIteration.
        """
        with progress_bar(description, total, done, self.bar) as bar:

            def after_step(step: int, timestep: float, x: Tensor) -> None:
                bar.update()
                if self.callback is None:
                    return
                try:
                    self.callback(step, timestep, x)
                except StopIteration as stop:
                    raise Interrupted(f"{description}: cancelled after step {step + 1} of {total}") from stop

            yield after_step

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())


def progress_bar(description: str, total: int, done: int = 0, show: bool | None = None) -> Any:
    """Return tqdm's bar on stderr; by default it shows on a terminal and in a notebook only."""
    # None: tqdm's own choice, which is not to show a bar where stderr is no terminal.
    disable = (None if not _in_notebook() else False) if show is None else not show
    return tqdm(total=total, initial=done, desc=description, disable=disable)


def _in_notebook() -> bool:
    """Return whether this is a notebook's process; its stderr shows bars, and is no terminal."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_ipython is not None and hasattr(get_ipython(), "kernel")
