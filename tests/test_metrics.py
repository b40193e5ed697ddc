"""Scores against closed forms, and in the order that eyes would put videos."""

import numpy as np
import pytest

from modelscope_i2v import metrics
from modelscope_i2v.errors import InvalidInputError
from modelscope_i2v.training.scenes import draw


@pytest.fixture(scope="module")
def scene():
    return draw(3)[0]


def noisy(video, strength, seed=0):
    noise = np.random.default_rng(seed).normal(0, strength, video.shape)
    return np.clip(video + noise, 0, 255).astype(np.uint8)


def blurred(video):
    padded = np.pad(video.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = video.shape[1:3]
    parts = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return (sum(parts) / 9).astype(np.uint8)


def test_psnr_of_a_constant_difference(scene):
    dark = (scene // 2).astype(np.uint8)
    assert metrics.psnr(dark + 5, dark) == pytest.approx(20 * np.log10(255 / 5))
    assert metrics.psnr(dark, dark) == 100


def test_ssim_is_one_for_equals_and_falls_with_noise(scene):
    values = [metrics.ssim(noisy(scene, strength), scene) for strength in (0, 5, 30)]
    assert values[0] == pytest.approx(1) and values[0] > values[1] > values[2]


def test_ssim_of_flat_frames_in_closed_form():
    a, b = (np.full((1, 16, 16, 3), value, np.uint8) for value in (100, 150))
    c1 = (0.01 * 255) ** 2
    assert metrics.ssim(a, b) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))


def test_false_texture_does_not_pass_for_edges(scene):
    texture = scene.astype(int) + 12 * (np.indices(scene.shape[1:3]).sum(0) % 2)[None, ..., None]
    textured = np.clip(texture, 0, 255).astype(np.uint8)
    assert metrics.sharpness(textured) > metrics.sharpness(scene)
    assert metrics.edge_psnr(textured, scene) < metrics.edge_psnr(blurred(scene), scene) < 100


def test_block_means_forgive_details_and_not_places(scene):
    assert metrics.block_psnr(noisy(scene, 20), scene) > 30
    assert metrics.block_psnr(scene[:, :, ::-1], scene) < 25


def test_motion_steady_still_and_flickering(scene):
    still = scene[:1].repeat(8, 0)
    assert metrics.motion(still) == metrics.motion_ratio(still) == metrics.flicker(still) == 0
    noise = noisy(np.full_like(scene, 128), 20)
    assert metrics.motion_ratio(noise) == pytest.approx(1, abs=0.05)
    assert metrics.motion_ratio(scene) > 2.2
    brightening = (
        np.full((8, 16, 16, 3), 10, np.uint8) + 5 * np.arange(8, dtype=np.uint8)[:, None, None, None]
    )
    assert metrics.motion_ratio(brightening) == pytest.approx(7)
    assert metrics.flicker(brightening) == 0
    assert metrics.flicker(noisy(scene, 20)) > 4 * metrics.flicker(scene)


def test_temporal_consistency_falls_where_a_video_jumps(scene):
    jumping = scene.copy()
    jumping[4:] = draw(0)[0][4:]
    assert metrics.temporal_consistency(scene) > 0.95 > metrics.temporal_consistency(jumping)


def test_seams_stand_out(scene):
    seamed = scene.copy()
    seamed[:, :, 80:] = np.minimum(seamed[:, :, 80:].astype(int) + 40, 255)
    assert metrics.seam_score(seamed, [80], axis=2) > 3 * metrics.seam_score(scene, [80], axis=2)
    assert metrics.seam_score(scene.repeat(2, 0), [2, 4], axis=0) > 1
    blank = np.zeros((6, 16, 16, 3), np.uint8)
    assert metrics.seam_score(blank, [3], axis=0) == 1
    blank[3:] = 10
    blank[:, 5:] += 5  # a step of 5 at each of F W pixels, of 16 H - 1 in all
    assert metrics.seam_score(blank + np.arange(16, dtype=np.uint8)[:, None, None], [5], axis=1) == 6


@pytest.mark.parametrize(("borders", "axis"), [([0], 0), ([8], 0), ([96], 1), ([1, 2, 3, 4, 5, 6, 7], 0)])
def test_borders_that_are_none_are_refused(scene, borders, axis):
    with pytest.raises(InvalidInputError, match=rf"borders: got \[{borders[0]}"):
        metrics.seam_score(scene, borders, axis)


def test_thumbnails_are_of_one_size_and_find_their_picture(scene):
    assert metrics.thumbnails(scene).shape == (8, 16, 16, 3)
    halves = np.zeros((1, 32, 48, 3), np.uint8)
    halves[:, :, 24:] = 200
    assert np.array_equal(metrics.thumbnails(halves)[0, :, :, 0], [[0] * 8 + [200] * 8] * 16)
    assert metrics.thumbnail_similarity(halves, halves[0, ::2, ::2]) == pytest.approx(1)
    assert metrics.thumbnail_similarity(halves, 200 - halves[0]) == pytest.approx(-1)
    assert metrics.thumbnail_similarity(scene, scene[0]) > metrics.thumbnail_similarity(scene, draw(0)[0][0])
    with pytest.raises(InvalidInputError, match=r"16x16 pixels or more, got \[15, 160\]"):
        metrics.thumbnails(scene[:, :15])


def test_consistency_of_flat_frames():
    """They have no correlation; the same ones are consistent, others are not."""
    flat = np.full((3, 16, 16, 3), 7, np.uint8)
    assert metrics.temporal_consistency(flat) == 1
    flat[1] = 8
    assert metrics.temporal_consistency(flat) == 0


def test_what_a_short_video_has_no_scores_of_is_left_out(scene):
    assert set(metrics.scores(scene[:1])) == {"sharpness"}
    assert "flicker" not in metrics.scores(scene[:2]) and "motion" in metrics.scores(scene[:2])


def test_similarity_of_embeddings():
    basis = np.eye(3)
    assert metrics.embedding_similarity(basis, basis) == 1
    assert metrics.embedding_similarity(basis, basis[0]) == pytest.approx(1 / 3)


def test_videos_of_two_shapes_are_refused(scene):
    with pytest.raises(InvalidInputError, match=r"of one shape .* \[8, 96, 160, 3\] and \[7, 96, 160, 3\]"):
        metrics.psnr(scene, scene[:-1])
    with pytest.raises(InvalidInputError, match="3 frames or more"):
        metrics.flicker(scene[:2])
