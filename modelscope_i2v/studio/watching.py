"""The progress of a job, as others see it while it runs, and their way to stop it."""

from __future__ import annotations

import base64
import io
import threading
import time
from contextlib import contextmanager
from typing import Iterator

import torch
from PIL import Image
from torch import Tensor

from ..engine.latent_colours import LatentColours
from ..engine.progress import Progress, StepCallback
from ..errors import Interrupted

#: Seconds between two pictures: one takes about a millisecond, so this is what bounds their cost.
_BETWEEN_PICTURES = 0.25


class Watched(Progress):
    """A progress whose state others read, from other threads, and which stops when they ask for it.

    Attributes:
        now: the phase.
        step, total: steps that are done, and all, of the present video.
        video, videos: of a job that makes several.
        picture: of the denoised estimate, a JPEG as a data URL; empty if there is none yet.
        colours: what draws it.
        made: files that are complete, in the order of their making.
    """

    def __init__(self, videos: int = 1) -> None:
        super().__init__(self._after_step, bar=False)
        self.now, self.step, self.total = "waiting", 0, 0
        self.video, self.videos = 0, videos
        self.picture = ""
        self.colours: LatentColours | None = None
        self.made: list[str] = []
        self._stop = threading.Event()
        self._started = self._drawn = 0.0

    def stop(self) -> None:
        """Ask the job to end, which it does within a step."""
        self._stop.set()

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the steps that are done; None as long as there are none."""
        if not self.step or self.now != "denoising":
            return None
        of_a_step = (time.monotonic() - self._started) / self.step
        return of_a_step * (self.total - self.step + self.total * (self.videos - self.video - 1))

    @contextmanager
    def phase(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Time a block, as every progress does, and tell its name.

        Raises:
            Interrupted: if the job is to stop.
        """
        if self._stop.is_set():
            raise Interrupted(f"cancelled before {name}")
        outer, self.now = self.now, name
        try:
            with super().phase(name, device):
                yield
        finally:
            self.now = outer

    @contextmanager
    def steps(self, description: str, total: int, done: int = 0) -> Iterator[StepCallback]:
        """Count the steps of a block; each draws a picture, if it is time for one."""
        self.step, self.total, self._started = 0, total - done, time.monotonic()
        with super().steps(description, total, done) as after_step:
            yield after_step

    def _after_step(self, step: int, timestep: float, x: Tensor) -> None:
        if self._stop.is_set():
            raise StopIteration
        self.step += 1
        now = time.monotonic()
        if self.colours is not None and self.estimate is not None and now - self._drawn > _BETWEEN_PICTURES:
            self._drawn, middle = now, self.estimate.shape[2] // 2
            self.picture = data_url(self.colours.draw(self.estimate[0, :, middle]))


def data_url(pixels: Tensor) -> str:
    """Return a picture [h, w, 3] uint8 as a JPEG in a URL."""
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
