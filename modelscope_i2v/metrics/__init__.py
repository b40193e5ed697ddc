"""Scores of videos: frames in, one number out. Frames are uint8 [F, H, W, 3] throughout.

What compares embeddings takes them from the caller, whichever network made them: with CLIP's image tower the
scores are those that papers call CLIP similarity, with another network they are not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInputError

Frames = NDArray[np.uint8]

BLOCK = 8  # side of a block, in pixels, where block means are compared


def psnr(video: Frames, reference: Frames) -> float:
    """Peak signal-to-noise ratio, 10 log10(255^2 / mean squared error), in dB, the mean over frames."""
    a, b = _pair(video, reference)
    return float(_decibels(a, b).mean())


def ssim(video: Frames, reference: Frames) -> float:
    """Structural similarity of luma, up to 1, the mean over positions and frames.

    Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861: Gaussian windows of 11 pixels with sigma 1.5,
    K1 = 0.01, K2 = 0.03, whole windows only.
    """
    a, b = (_luma(each) for each in _pair(video, reference))
    mean_a, mean_b = _smooth(a), _smooth(b)
    variance_a, variance_b = _smooth(a * a) - mean_a**2, _smooth(b * b) - mean_b**2
    covariance = _smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((likeness * (2 * covariance + c2) / (variance_a + variance_b + c2)).mean())


def edge_psnr(video: Frames, reference: Frames) -> float:
    """PSNR of luma's gradient, in dB: texture at a wrong place counts against a video, as blur does."""
    a, b = (np.stack(_gradient(_luma(each)), axis=-1) for each in _pair(video, reference))
    return float(_decibels(a, b).mean())


def block_psnr(video: Frames, reference: Frames) -> float:
    """PSNR of the means of blocks of 8x8 pixels, in dB: whether colours are in their places, not details."""
    a, b = _pair(video, reference)
    return float(_decibels(block_means(a), block_means(b)).mean())


def block_means(frames: NDArray) -> NDArray[np.float64]:
    """[F, H / 8, W / 8, 3]: the mean of each whole block."""
    count, height, width, colours = frames.shape
    rows, columns = height // BLOCK, width // BLOCK
    whole = frames[:, : rows * BLOCK, : columns * BLOCK].astype(np.float64)
    return whole.reshape(count, rows, BLOCK, columns, BLOCK, colours).mean(axis=(2, 4))


def motion(video: Frames) -> float:
    """Mean absolute difference of neighbouring frames, in 0..255."""
    return float(np.abs(np.diff(_several(video, 2), axis=0)).mean())


def motion_ratio(video: Frames) -> float:
    """|last - first| / |next - this|, means of absolute differences: how far motion leads.

    About 1 for independent noise in every frame, up to the number of steps for steady motion, and 0 for a
    still video.
    """
    frames = _several(video, 2)
    step = np.abs(np.diff(frames, axis=0)).mean()
    return float(np.abs(frames[-1] - frames[0]).mean() / step) if step else 0.0


def flicker(video: Frames) -> float:
    """Mean absolute second difference over time, |next - 2 this + previous| / 2, in 0..255."""
    return float(np.abs(np.diff(_several(video, 3), n=2, axis=0)).mean() / 2)


def temporal_consistency(video: Frames) -> float:
    """Mean correlation of neighbouring frames' block means, up to 1."""
    means = block_means(_several(video, 2))
    return float(np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(means, means[1:])]))


def sharpness(video: Frames) -> float:
    """Variance of luma's Laplacian, the mean over frames (Pech-Pacheco et al. 2000)."""
    luma = _luma(video.astype(np.float64))
    centre = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return float((around - 4 * centre).var(axis=(1, 2)).mean())


def seam_score(video: Frames, borders: list[int], axis: int) -> float:
    """The step across borders relative to the steps on either side of them: 1 where there is no seam.

    Args:
        video: the frames.
        borders: where on the axis something new begins: frames for windows, rows or columns for tiles.
        axis: 0 for frames, 1 for rows, 2 for columns.
    """
    steps = np.abs(np.diff(video.astype(np.float64), axis=axis)).mean(axis=tuple({0, 1, 2, 3} - {axis}))
    across = [border - 1 for border in borders]
    beside = [place + side for place in across for side in (-2, -1, 1, 2) if 0 <= place + side < len(steps)]
    ordinary = steps[[place for place in beside if place not in across]].mean()
    return float(steps[across].mean() / ordinary) if ordinary else 1.0


def embedding_similarity(first: NDArray, second: NDArray) -> float:
    """Mean cosine similarity of embeddings [N, D] with those of one image [D] or of as many [N, D].

    With CLIP's: image-video similarity (https://arxiv.org/abs/2104.08718), and for neighbouring frames,
    frame consistency.
    """
    a, b = (each / np.linalg.norm(each, axis=-1, keepdims=True) for each in (first, second))
    return float((a * b).sum(axis=-1).mean())


def _pair(video: Frames, reference: Frames) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if video.shape != reference.shape or video.ndim != 4:
        raise InvalidInputError(
            f"two videos [F, H, W, 3] of one shape are needed, got {list(video.shape)} and "
            f"{list(reference.shape)}; resize or cut one of them"
        )
    return video.astype(np.float64), reference.astype(np.float64)


def _several(video: Frames, least: int) -> NDArray[np.float64]:
    if video.ndim != 4 or len(video) < least:
        raise InvalidInputError(
            f"a video [F, H, W, 3] of {least} frames or more is needed, got {list(video.shape)}"
        )
    return video.astype(np.float64)


def _decibels(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """PSNR of each frame; 100 dB at most, so that a mean over frames stays finite."""
    errors = ((a - b) ** 2).reshape(len(a), -1).mean(axis=1)
    return 10 * np.log10(255**2 / np.maximum(errors, 255**2 / 1e10))


def _luma(frames: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rec. 601: 0.299 R + 0.587 G + 0.114 B."""
    return frames @ np.array([0.299, 0.587, 0.114])


def _gradient(luma: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Differences to the next pixel across and down."""
    return np.diff(luma, axis=2)[:, :-1], np.diff(luma, axis=1)[:, :, :-1]


def _smooth(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Gaussian mean about each pixel whose whole window lies in the image."""
    offsets = np.arange(11) - 5
    kernel = np.exp(-(offsets**2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    for axis in (1, 2):
        size = images.shape[axis] - 10
        if size < 1:
            raise InvalidInputError(
                f"SSIM needs frames of 11x11 pixels or more, got {list(images.shape[1:])}"
            )
        parts = (images.take(range(start, start + size), axis=axis) for start in range(11))
        images = sum(weight * part for weight, part in zip(kernel, parts))
    return images
