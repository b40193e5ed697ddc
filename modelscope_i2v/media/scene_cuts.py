"""Cuts between scenes, found in the differences of neighbouring frames."""

from __future__ import annotations

from collections import deque
from itertools import chain, groupby, repeat
from typing import Any, Callable, Iterable, Iterator

import numpy as np

_SIDE = 32  # of the grid of means that stands for a frame
_REACH = 2  # frames before and after whose differences a cut's is compared with
_RATIO = 2.5  # how far it stands out
_LEAST = 10.0  # mean absolute difference, in 0..255


def split_scenes(
    frames: Iterable[Any],
    most: int | None = None,
    cuts: bool = True,
    pixels: Callable[[Any], np.ndarray] = lambda frame: frame,
) -> Iterator[Iterator[Any]]:
    """Split frames at the cuts; a few frames are held at a time.

    A cut is where the mean absolute difference to the frame before is several times that of all differences
    nearby (the adaptive threshold of https://www.scenedetect.com/docs/latest/api/detectors.html). A flash,
    which has two such differences, is none, and neither is motion.

    Args:
        frames: of one size.
        most: frames of a scene; a longer one is split all the same.
        cuts: whether to look for cuts at all.
        pixels: gives a frame's uint8 [H, W, 3].

    Yields:
        The frames of each scene, to be taken before the next scene.
    """
    if most is None and not cuts:
        return iter([iter(frames)])
    numbered = _numbered(frames, most, pixels if cuts else None)
    return ((frame for _, frame in scene) for _, scene in groupby(numbered, key=lambda each: each[0]))


def _numbered(
    frames: Iterable[Any], most: int | None, pixels: Callable[[Any], np.ndarray] | None
) -> Iterator[tuple[int, Any]]:
    """Yield frames with the numbers of their scenes."""
    waiting: deque[tuple[Any, float]] = deque()  # frames with the differences before them
    before: deque[float] = deque(maxlen=_REACH)
    scene = length = 0
    previous = None
    for frame in chain(frames, repeat(None, _REACH)):
        means = None if frame is None or pixels is None else _means(pixels(frame))
        change = 0.0 if means is None or previous is None else float(np.abs(means - previous).mean())
        waiting.append((frame, change))
        previous = means
        if len(waiting) <= _REACH:
            continue
        decided, change = waiting.popleft()
        if decided is None:
            continue
        nearby = max(chain(before, (each for _, each in waiting)), default=0.0)
        if length and (change >= max(_LEAST, _RATIO * nearby) or length == most):
            scene, length = scene + 1, 0
        before.append(change)
        length += 1
        yield scene, decided


def _means(frame: np.ndarray) -> np.ndarray:
    """The means of a grid's cells, [rows, columns, 3]; of a small frame, its pixels."""
    sides = frame.shape[:2]
    rows, columns = (np.linspace(0, side, min(side, _SIDE), endpoint=False).astype(int) for side in sides)
    sums = np.add.reduceat(np.add.reduceat(frame, rows, axis=0, dtype=np.float32), columns, axis=1)
    heights, widths = np.diff([*rows, frame.shape[0]]), np.diff([*columns, frame.shape[1]])
    return sums / (heights[:, None, None] * widths[None, :, None])
