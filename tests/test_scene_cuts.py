"""Where one scene ends and another begins: drawn cuts are found, and what looks like one is none."""

from __future__ import annotations

import numpy as np
import pytest

from modelscope_i2v.media.scene_cuts import split_scenes
from modelscope_i2v.training.scenes import TRAINING_SEEDS, draw


def lengths(frames, **options) -> list[int]:
    return [sum(1 for _ in scene) for scene in split_scenes(frames, **options)]


def scene(seed: int, frames: int) -> np.ndarray:
    return draw(TRAINING_SEEDS + seed, frames, (80, 48))[0]


def test_drawn_cuts_are_found():
    """Of 45 cuts between random scenes, most of which share a sky or a ground."""
    rng = np.random.default_rng(0)
    found = 0
    for trial in range(15):
        counts = [int(count) for count in rng.integers(5, 14, 4)]
        video = np.concatenate([scene(10 * trial + index, count) for index, count in enumerate(counts)])
        ends = set(np.cumsum(lengths(video))[:-1])
        assert ends <= set(np.cumsum(counts)[:-1])  # none is made up
        found += len(ends)
    assert found >= 42


def test_motion_and_noise_are_no_cuts():
    rng = np.random.default_rng(0)
    assert lengths(scene(3, 40)) == [40]
    assert lengths(rng.integers(0, 256, (30, 48, 80, 3), np.uint8)) == [30]
    pan = np.stack([np.roll(scene(4, 1)[0], 9 * step, axis=1) for step in range(20)])
    assert lengths(pan) == [20]


def test_a_flash_is_no_cut():
    video = scene(5, 12)
    video[6] = 255
    assert lengths(video) == [12]


def test_a_fade_is_no_cut():
    weights = np.linspace(0, 1, 24)[:, None, None, None]
    assert lengths(((1 - weights) * scene(6, 1) + weights * scene(7, 1)).astype(np.uint8)) == [24]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_cut_near_an_end(count):
    video = np.concatenate([np.full((count, 8, 8, 3), 20, np.uint8), np.full((9, 8, 8, 3), 200, np.uint8)])
    assert lengths(video) == [count, 9]
    assert lengths(video[::-1]) == [9, count]


def test_cuts_can_be_left_alone_and_long_scenes_are_split():
    video = np.concatenate([np.full((5, 8, 8, 3), 20, np.uint8), np.full((9, 8, 8, 3), 200, np.uint8)])
    assert lengths(video, cuts=False) == [14]
    assert lengths(video, most=4) == [4, 1, 4, 4, 1]
    assert lengths(video, most=10, cuts=False) == [10, 4]
    assert lengths([]) == []


def test_every_frame_passes_once_and_few_are_held():
    given = []

    def frames():
        for index in range(30):
            given.append(index)
            yield np.full((8, 8, 3), 200 * (index > 11), np.uint8)

    taken = 0
    for part in split_scenes(frames()):
        for frame in part:
            assert (frame[0, 0, 0] > 0) == (taken > 11)
            taken += 1
            assert len(given) - taken <= 2
    assert taken == 30
