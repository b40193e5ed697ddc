"""Procedural videos for training and tests: a sky, a ground, one object that moves, and a caption.

A scene is a few numbers drawn from a seed. It is painted from signed distances in units of the picture's
height, the origin in the middle of the picture and y downwards, so that it is the same at any size: a wider
picture shows more at its sides. The object begins within the central square and moves towards the middle, so
that the first frame tells the direction; the landscape passes the other way, as from a camera that follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Callable, Iterable

import numpy as np

#: Seeds below this are for training; others are for tests.
TRAINING_SEEDS = 1_000_000

#: Top and bottom of the sky, what light makes of other colours, and the sun or moon.
_SKIES = {
    "clear": ((66, 132, 222), (190, 222, 246), (1.0, 1.0, 1.0), (255, 244, 190)),
    "sunset": ((212, 92, 64), (252, 206, 122), (0.92, 0.74, 0.66), (255, 238, 170)),
    "night": ((10, 14, 46), (46, 58, 112), (0.44, 0.48, 0.66), (236, 236, 214)),
}
#: Near and far colour.
_GROUNDS = {
    "green hills": ((86, 152, 62), (66, 118, 96)),
    "sand dunes": ((222, 182, 112), (188, 146, 104)),
    "snow": ((236, 240, 246), (176, 192, 214)),
    "the sea": ((30, 98, 138), (64, 136, 168)),
}
COLOURS = {"red": (214, 36, 40), "yellow": (248, 206, 32), "blue": (36, 72, 208), "green": (24, 150, 84)}
_DARK, _PALE = (44, 40, 44), (244, 242, 236)


@dataclass(frozen=True)
class Scene:
    """What is in a scene. Lengths are in heights of the picture, times in seconds.

    ``x`` and ``y`` are the object's centre in the first frame, ``speed`` its horizontal speed.
    """

    sky: str
    ground: str
    kind: str
    colour: str
    x: float
    y: float
    size: float
    speed: float
    rise: float
    horizon: float
    ridge: tuple[float, float]
    sun: tuple[float, float] | None
    cloud: tuple[float, float] | None

    @classmethod
    def from_seed(cls, seed: int) -> Scene:
        """The scene of a seed, which may be any integer from 0 up."""
        u = np.random.Generator(np.random.PCG64(seed)).random(16).tolist()
        ground = _pick(_GROUNDS, u[0])
        kind = _pick(_kinds(ground), u[1])
        horizon = 0.10 + 0.08 * u[2]
        ridge = (0.02 + 0.03 * u[3], 2 * np.pi * u[4])
        side = 1.0 if u[5] < 0.5 else -1.0
        size = 0.30 + 0.06 * u[6]
        x = side * (0.10 + 0.20 * u[7])
        y = -0.10 + 0.12 * u[8] if kind == "balloon" else 0.26 + 0.06 * u[8]
        return cls(
            sky=_pick(_SKIES, u[9]),
            ground=ground,
            kind=kind,
            colour=_pick(_colours(ground), u[10]),
            x=x,
            y=y,
            size=size,
            speed=-side * (0.26 + 0.08 * u[11]),
            rise=0.10 if kind == "balloon" else 0.0,
            horizon=horizon,
            ridge=ridge,
            sun=(side * -(0.14 + 0.20 * u[13]), -0.32 + 0.08 * u[14]) if u[12] < 0.6 else None,
            cloud=(side * (0.10 + 0.25 * u[14]), -0.34 + 0.10 * u[13]) if u[15] < 0.5 else None,
        )

    @property
    def caption(self) -> str:
        """Such as "a red balloon above the sea under a night sky"."""
        return _caption(self.colour, self.kind, self.ground, self.sky)

    @cached_property
    def object_colour(self) -> np.ndarray:
        """The object's colour in the scene's light, float32 [3] in 0..255."""
        return _mix(self._lit(COLOURS[self.colour]), np.array(COLOURS[self.colour], np.float32), 0.6)

    def position(self, time: float) -> tuple[float, float]:
        """The object's centre. It turns back where it would leave the middle of the picture."""
        x, _ = _between(self.x + self.speed * time, -0.42, 0.42)
        y, _ = _between(self.y - self.rise * time, -0.26, 0.40)
        return x, y

    def _lit(self, colour: tuple[int, int, int]) -> np.ndarray:
        return np.array(colour, np.float32) * np.array(_SKIES[self.sky][2], np.float32)

    def frame(self, time: float, size: tuple[int, int]) -> np.ndarray:
        """Paint one frame, uint8 [H, W, 3], for a size of (W, H) pixels."""
        canvas = _Canvas(size)
        top, bottom, _, disc = (np.array(each, np.float32) for each in _SKIES[self.sky])
        canvas.gradient(top, bottom, self.horizon)
        if self.sun is not None:
            canvas.paint(_circle(*self.sun, 0.085), disc)
        pan = -np.sign(self.speed) * time
        if self.cloud is not None:
            cloud_colour = _mix(bottom, self._lit((255, 255, 255)), 0.7)
            canvas.paint(_cloud(self.cloud[0] + 0.14 * pan, self.cloud[1]), cloud_colour)
        self._paint_ground(canvas, pan)
        x, y = self.position(time)
        facing = np.sign(_between(self.x + self.speed * time, -0.42, 0.42)[1] * self.speed)
        body = self.object_colour
        dark, pale = self._lit(_DARK), _mix(self._lit(_PALE), np.array(_PALE, np.float32), 0.4)
        for shape, colour in _OBJECTS[self.kind](body, dark, pale):
            canvas.paint(_placed(shape, x, y, self.size, facing), colour)
        return canvas.pixels()

    def clip(self, frames: int, size: tuple[int, int], fps: float) -> np.ndarray:
        """Paint frames from the first one on, uint8 [F, H, W, 3]."""
        return np.stack([self.frame(number / fps, size) for number in range(frames)])

    def _paint_ground(self, canvas: _Canvas, pan: float) -> None:
        near, far = (self._lit(colour) for colour in _GROUNDS[self.ground])
        height, phase = self.ridge
        if self.ground == "the sea":
            canvas.paint(_below(self.horizon, 0.0, 0.0, 1.0), far)
            canvas.paint(_below(self.horizon + 0.16, 0.4 * height, phase - 3.5 * pan, 7.0), near)
            return
        canvas.paint(_below(self.horizon - 0.04, 1.6 * height, phase - 0.9 * pan, 5.0), far)
        canvas.paint(_below(self.horizon + 0.14, 0.7 * height, 2.0 * phase - 1.6 * pan, 4.0), near)


def draw(
    seed: int, frames: int = 8, size: tuple[int, int] = (160, 96), fps: float = 8
) -> tuple[np.ndarray, str]:
    """Draw the scene of a seed.

    Args:
        seed: 0 or more. Those below ``TRAINING_SEEDS`` are for training.
        frames: how many.
        size: (width, height) in pixels.
        fps: frames a second, which changes how far things move from one frame to the next.

    Returns:
        The frames, uint8 [F, H, W, 3], and a caption.
    """
    scene = Scene.from_seed(seed)
    return scene.clip(frames, size, fps), scene.caption


def all_captions() -> list[str]:
    """Every caption that there is."""
    return [
        _caption(colour, kind, ground, sky)
        for sky in _SKIES
        for ground in _GROUNDS
        for kind in _kinds(ground)
        for colour in _colours(ground)
    ]


def _kinds(ground: str) -> tuple[str, ...]:
    return ("boat", "balloon") if ground == "the sea" else ("ball", "car", "balloon")


def _colours(ground: str) -> list[str]:
    return [name for name in COLOURS if not (name == "green" and ground == "green hills")]


def _caption(colour: str, kind: str, ground: str, sky: str) -> str:
    place = "above" if kind == "balloon" else "on"
    return f"a {colour} {kind} {place} {ground} under a {sky} sky"


class _Canvas:
    """An image under the brush, and the coordinates of its pixels' centres."""

    def __init__(self, size: tuple[int, int]):
        width, height = size
        self.height = height
        self.x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / height)[None, :]
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) / height - 0.5)[:, None]
        self.image = np.zeros((height, width, 3), np.float32)

    def gradient(self, top: np.ndarray, bottom: np.ndarray, end: float) -> None:
        weight = np.clip((self.y + 0.5) / (end + 0.5), 0, 1)[..., None]
        self.image[:] = top + weight * (bottom - top)

    def paint(self, distance: _Distance, colour: np.ndarray) -> None:
        """Colour what lies at a distance below 0, its edge one pixel wide."""
        rows, columns = self._box(distance.box)
        cover = 0.5 - distance.function(self.x[:, columns], self.y[rows]) * self.height
        cover = np.clip(cover, 0, 1, out=cover)[..., None]
        part = self.image[rows, columns]
        part += cover * (colour.astype(np.float32) - part)

    def _box(self, box: tuple[float, float, float, float]) -> tuple[slice, slice]:
        left, top, right, bottom = box
        margin = 1.0 / self.height
        columns = np.searchsorted(self.x[0], [left - margin, right + margin])
        rows = np.searchsorted(self.y[:, 0], [top - margin, bottom + margin])
        return slice(*rows), slice(*columns)

    def pixels(self) -> np.ndarray:
        return (self.image + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class _Distance:
    """A shape: its signed distance, and the box (left, top, right, bottom) outside of which it is not."""

    function: Callable[[np.ndarray, np.ndarray], np.ndarray]
    box: tuple[float, float, float, float]


def _circle(cx: float, cy: float, radius: float) -> _Distance:
    return _ellipse(cx, cy, radius, radius)


def _ellipse(cx: float, cy: float, a: float, b: float) -> _Distance:
    def distance(x, y):  # exact for circles, to first order for others
        p, q = (x - cx) / a, (y - cy) / b
        length = np.sqrt(p * p + q * q)
        slope = np.sqrt((p / a) ** 2 + (q / b) ** 2) + np.float32(1e-6)
        return (length - 1) * length / slope

    return _Distance(distance, (cx - a, cy - b, cx + a, cy + b))


def _box(cx: float, cy: float, a: float, b: float, round_by: float = 0.0) -> _Distance:
    def distance(x, y):
        p, q = np.abs(x - cx) - (a - round_by), np.abs(y - cy) - (b - round_by)
        outside = np.sqrt(np.maximum(p, 0) ** 2 + np.maximum(q, 0) ** 2)
        return outside + np.minimum(np.maximum(p, q), 0) - round_by

    return _Distance(distance, (cx - a, cy - b, cx + a, cy + b))


def _polygon(*corners: tuple[float, float]) -> _Distance:
    """A convex polygon, its corners clockwise on the screen."""

    def distance(x, y):
        edges = []
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
            dx, dy = bx - ax, by - ay
            edges.append(((x - ax) * dy - (y - ay) * dx) / np.hypot(dx, dy))
        return np.maximum.reduce(edges)

    xs, ys = zip(*corners)
    return _Distance(distance, (min(xs), min(ys), max(xs), max(ys)))


def _union(*shapes: _Distance) -> _Distance:
    lefts, tops, rights, bottoms = zip(*(shape.box for shape in shapes))
    box = (min(lefts), min(tops), max(rights), max(bottoms))
    return _Distance(lambda x, y: np.minimum.reduce([shape.function(x, y) for shape in shapes]), box)


def _cloud(cx: float, cy: float) -> _Distance:
    return _union(
        _ellipse(cx - 0.12, cy + 0.015, 0.10, 0.045),
        _ellipse(cx, cy - 0.02, 0.12, 0.07),
        _ellipse(cx + 0.12, cy + 0.01, 0.11, 0.05),
    )


def _below(level: float, height: float, phase: float, frequency: float) -> _Distance:
    """All that lies below a line with waves."""

    def distance(x, y):
        angle = frequency * x + phase
        slope = height * frequency * np.cos(angle)
        return (level - height * np.sin(angle) - y) / np.sqrt(1 + slope * slope)

    return _Distance(distance, (-np.inf, level - height, np.inf, np.inf))


def _placed(shape: _Distance, cx: float, cy: float, scale: float, facing: float) -> _Distance:
    """A shape of unit size somewhere else, looking right (facing 1) or left (-1)."""
    left, top, right, bottom = (scale * edge for edge in shape.box)
    left, right = (left, right) if facing > 0 else (-right, -left)

    def distance(x, y):
        return scale * shape.function((x - cx) * (facing / scale), (y - cy) / scale)

    return _Distance(distance, (cx + left, cy + top, cx + right, cy + bottom))


# Objects, of unit size about the origin, looking right: shapes with their colours, from back to front.


def _ball(body, dark, pale):
    yield _circle(0, 0, 0.5), body
    yield _ellipse(0.14, -0.18, 0.16, 0.13), _mix(body, pale, 0.7)


def _balloon(body, dark, pale):
    yield _polygon((-0.30, 0.10), (0.30, 0.10), (0.10, 0.52), (-0.10, 0.52)), _mix(body, dark, 0.35)
    yield _ellipse(0, -0.12, 0.48, 0.50), body
    yield _ellipse(0, -0.12, 0.17, 0.50), _mix(body, pale, 0.55)
    yield _box(0, 0.60, 0.14, 0.11, 0.03), dark


def _car(body, dark, pale):
    yield _polygon((-0.32, -0.36), (0.14, -0.36), (0.36, 0.0), (-0.46, 0.0)), body
    yield _polygon((-0.27, -0.29), (0.11, -0.29), (0.24, -0.06), (-0.35, -0.06)), pale
    yield _box(0.04, 0.10, 0.66, 0.17, 0.08), body
    yield _circle(-0.34, 0.26, 0.17), dark
    yield _circle(0.38, 0.26, 0.17), dark


def _boat(body, dark, pale):
    yield _box(-0.03, -0.14, 0.03, 0.46), dark
    yield _polygon((0.03, -0.60), (0.52, 0.16), (0.03, 0.16)), pale
    yield _polygon((-0.09, -0.50), (-0.09, 0.16), (-0.44, 0.16)), pale
    yield _polygon((-0.62, 0.22), (0.70, 0.22), (0.44, 0.52), (-0.44, 0.52)), body


_OBJECTS = {"ball": _ball, "balloon": _balloon, "car": _car, "boat": _boat}


def _pick(options: Iterable[str], u: float) -> str:
    names = list(options)
    return names[min(int(u * len(names)), len(names) - 1)]


def _mix(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    return a + weight * (b - a)


def _between(value: float, low: float, high: float) -> tuple[float, float]:
    """A value that turns back at both ends, and the direction it goes there: 1 or -1."""
    along = (value - low) % (2 * (high - low))
    return (low + along, 1.0) if along <= high - low else (low + 2 * (high - low) - along, -1.0)
