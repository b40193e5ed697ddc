"""What comes of a scene's generation beside its latents."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from ..samplers.schedules import SolverState
from ..samplers.windows import WindowVelocity
from ..settings.request import Request
from .colours import low_frequencies
from .unfinished import SavedScene


class BesideLatents:
    """The source's colours, the tiles that were used, and where the state is kept if it is.

    Attributes:
        tile_size: of the tiles in pixels, None for whole frames.
    """

    def __init__(self, saved: SavedScene | None = None):
        self._saved, self.tile_size = saved, None  # type: SavedScene | None, int | None
        self._grids: list[Tensor] = []

    def colours_seen(self, request: Request) -> Callable[[Tensor], None] | None:
        """Return what is to be called with each source frame [1, 3, H, W]; None if the request minds none."""
        return self._add_colours if request.colour == "source" else None

    def _add_colours(self, frame: Tensor) -> None:
        self._grids.append(low_frequencies(frame).cpu())

    @property
    def colours(self) -> Tensor | None:
        """The source's low frequencies, [F, 3, ..]."""
        return torch.cat(self._grids) if self._grids else None

    def load(self) -> tuple[SolverState, int] | None:
        """Return the sampler's last state and the Brownian tree's seed, if they were kept."""
        found = self._saved.load() if self._saved is not None else None
        if found is None:
            return None
        state, colours, entropy = found
        self._grids = [] if colours is None else [colours]
        return state, entropy

    def save(self, state: SolverState, entropy: int, always: bool = False) -> None:
        """Keep the sampler's state, if anything is kept, and if it took a while or is to be ``always``."""
        if self._saved is not None:
            self._saved.save(state, self.colours, entropy, always)

    def remember(self, velocity: WindowVelocity) -> WindowVelocity:
        """Wrap the prediction of windows: what is kept is not predicted again."""
        return velocity if self._saved is None else self._saved.remember(velocity)
