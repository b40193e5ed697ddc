"""Procedural scenes: deterministic, the same at any size, as their captions say, moving steadily."""

import numpy as np
import pytest

from modelscope_i2v import metrics
from modelscope_i2v.training.scenes import COLOURS, TRAINING_SEEDS, Scene, all_captions, draw

SEEDS = range(TRAINING_SEEDS, TRAINING_SEEDS + 12)


def test_drawing_is_deterministic_and_seeds_differ():
    (first, caption), (again, _), (other, _) = draw(5), draw(5), draw(6)
    assert first.dtype == np.uint8 and first.shape == (8, 96, 160, 3)
    assert np.array_equal(first, again)
    assert metrics.psnr(first, other) < 30
    assert caption == Scene.from_seed(5).caption


def test_a_golden_scene():
    frames, caption = draw(0, frames=2)
    assert caption == "a green ball on snow under a night sky"
    assert frames[0].mean((0, 1)).tolist() == pytest.approx([54.27, 68.69, 108.9], abs=0.1)
    pixels = [frames[0, 10, 80], frames[1, 80, 60], frames[0, 90, 5]]  # sky, ball, ground
    assert [pixel.tolist() for pixel in pixels] == [[17, 22, 58], [19, 119, 73], [104, 115, 162]]


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_the_same_content_at_another_size(seed):
    small, large = draw(seed, 2, (160, 96))[0], draw(seed, 2, (320, 192))[0]
    halved = large.reshape(2, 96, 2, 160, 2, 3).mean((2, 4)).round().astype(np.uint8)
    assert metrics.psnr(small, halved) > 36
    # A wider picture shows more at its sides, and the same in its middle.
    square = draw(seed, 2, (96, 96))[0]
    assert np.abs(square.astype(int) - small[:, :, 32:-32]).max() <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_the_object_is_where_and_what_the_scene_says(seed):
    scene = Scene.from_seed(seed)
    assert scene.colour in scene.caption and scene.kind in scene.caption and scene.ground in scene.caption
    assert scene.caption in all_captions()
    height = 96
    frame = scene.frame(0.0, (160, height)).astype(int)
    found = np.abs(frame - scene.object_colour).max(-1) < 12
    rows, columns = found.nonzero()
    assert found.sum() > 60
    assert (columns.mean() + 0.5 - 80) / height == pytest.approx(scene.x, abs=0.1)
    assert (rows.mean() + 0.5) / height - 0.5 == pytest.approx(scene.y, abs=0.16)
    assert np.abs((columns + 0.5 - 80) / height).max() <= 0.55  # within the square that stage one sees
    nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - scene.object_colour).sum())
    assert nearest == scene.colour


@pytest.mark.parametrize("seed", SEEDS)
def test_motion_is_steady_and_goes_to_the_middle(seed):
    frames, _ = draw(seed)
    assert metrics.motion_ratio(frames) > 2.2
    assert metrics.motion(frames) > 1
    scene = Scene.from_seed(seed)
    assert np.sign(scene.speed) == -np.sign(scene.x)


def test_the_frame_rate_changes_steps_and_not_speed():
    slow, fast = draw(7, 3, fps=4)[0], draw(7, 5, fps=8)[0]
    assert np.array_equal(slow, fast[::2])


def test_an_object_stays_in_the_picture():
    scene = Scene.from_seed(11)
    places = [scene.position(time) for time in np.linspace(0, 20, 200)]
    assert all(abs(x) <= 0.42 and -0.26 <= y <= 0.40 for x, y in places)
    steps = np.diff([x for x, _ in places])
    assert np.abs(steps).max() < 2 * abs(scene.speed) * 0.11
