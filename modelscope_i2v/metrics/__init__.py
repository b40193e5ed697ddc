"""Scores of videos: frames in, one number out. Frames are uint8 [F, H, W, 3] throughout.

They go through the formulas one by one, or with their neighbours, so that a long video takes little memory.
What compares embeddings takes them from the caller, whichever network made them: with CLIP's image tower the
scores are those that papers call CLIP similarity, with another network they are not.
"""

from __future__ import annotations

from typing import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInputError

Frames = NDArray[np.uint8]
Floats = NDArray[np.float64]

BLOCK = 8  # side of a block, in pixels, where block means are compared
THUMBNAIL = 16  # rows and columns of a thumbnail


def psnr(video: Frames, reference: Frames) -> float:
    """Peak signal-to-noise ratio, 10 log10(255^2 / mean squared error), in dB, the mean over frames."""
    return float(np.mean([_decibels(a, b) for a, b in _pairs(video, reference)]))


def ssim(video: Frames, reference: Frames) -> float:
    """Structural similarity of luma, up to 1, the mean over positions and frames.

    Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861: Gaussian windows of 11 pixels with sigma 1.5,
    K1 = 0.01, K2 = 0.03, whole windows only.
    """
    return float(np.mean([_ssim(_luma(a), _luma(b)) for a, b in _pairs(video, reference)]))


def _ssim(a: Floats, b: Floats) -> float:
    mean_a, mean_b = _smooth(a), _smooth(b)
    variance_a, variance_b = _smooth(a * a) - mean_a**2, _smooth(b * b) - mean_b**2
    covariance = _smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((likeness * (2 * covariance + c2) / (variance_a + variance_b + c2)).mean())


def edge_psnr(video: Frames, reference: Frames) -> float:
    """PSNR of luma's gradient, in dB: texture at a wrong place counts against a video, as blur does."""
    pairs = _pairs(video, reference)
    return float(np.mean([_decibels(_gradient(_luma(a)), _gradient(_luma(b))) for a, b in pairs]))


def block_psnr(video: Frames, reference: Frames) -> float:
    """PSNR of the means of blocks of 8x8 pixels, in dB: whether colours are in their places, not details."""
    pairs = _pairs(video, reference)
    return float(np.mean([_decibels(block_means(a[None]), block_means(b[None])) for a, b in pairs]))


def block_means(frames: NDArray) -> Floats:
    """[F, H / 8, W / 8, 3]: the mean of each whole block."""
    height, width, colours = frames.shape[1:]
    rows, columns = height // BLOCK, width // BLOCK
    whole = frames[:, : rows * BLOCK, : columns * BLOCK]
    return whole.reshape(len(frames), rows, BLOCK, columns, BLOCK, colours).mean(
        axis=(2, 4), dtype=np.float64
    )


def thumbnails(frames: NDArray) -> Floats:
    """[F, 16, 16, 3]: the mean of each of 16x16 parts of a frame, whatever its shape."""
    for axis in (1, 2):
        size = frames.shape[axis]
        if size < THUMBNAIL:
            raise InvalidInputError(
                f"thumbnails need frames of {THUMBNAIL}x{THUMBNAIL} pixels or more, "
                f"got {list(frames.shape[1:3])}"
            )
        edges = np.linspace(0, size, THUMBNAIL + 1).astype(int)
        parts = [
            frames.take(range(first, last), axis).mean(axis, dtype=np.float64, keepdims=True)
            for first, last in zip(edges, edges[1:])
        ]
        frames = np.concatenate(parts, axis)
    return frames


def thumbnail_similarity(video: Frames, image: Frames) -> float:
    """Mean correlation of the frames' thumbnails with an image's [H, W, 3], up to 1, whatever its size.

    Image-video similarity without a network: the same colours in the same places.
    """
    [small] = thumbnails(image[None])
    return float(np.mean([_correlation(each, small) for each in thumbnails(video)]))


def motion(video: Frames) -> float:
    """Mean absolute difference of neighbouring frames, in 0..255."""
    return float(np.mean([np.abs(b - a).mean() for a, b in _neighbours(video, 2)]))


def motion_ratio(video: Frames) -> float:
    """|last - first| / |next - this|, means of absolute differences: how far motion leads.

    About 1 for independent noise in every frame, up to the number of steps for steady motion, and 0 for a
    still video.
    """
    step = motion(video)
    return float(np.abs(video[-1].astype(np.float64) - video[0]).mean() / step) if step else 0.0


def flicker(video: Frames) -> float:
    """Mean absolute second difference over time, |next - 2 this + previous| / 2, in 0..255."""
    return float(np.mean([np.abs(c - 2 * b + a).mean() / 2 for a, b, c in _neighbours(video, 3)]))


def temporal_consistency(video: Frames) -> float:
    """Mean correlation of neighbouring frames' block means, up to 1."""
    return float(
        np.mean([_correlation(*map(block_means, (a[None], b[None]))) for a, b in _neighbours(video, 2)])
    )


def sharpness(video: Frames) -> float:
    """Variance of luma's Laplacian, the mean over frames (Pech-Pacheco et al. 2000)."""
    return float(np.mean([_laplacian(_luma(frame.astype(np.float64))).var() for frame in video]))


def _laplacian(luma: Floats) -> Floats:
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return around - 4 * luma[1:-1, 1:-1]


def seam_score(video: Frames, borders: Sequence[int], axis: int) -> float:
    """The step across borders relative to the steps on either side of them: 1 where there is no seam.

    Args:
        video: the frames.
        borders: where on the axis something new begins: frames for windows, rows or columns for tiles.
        axis: 0 for frames, 1 for rows, 2 for columns.

    Raises:
        InvalidInputError: for borders that are not within the video, or leave no step to compare with.
    """
    if axis == 0:
        steps = np.array([np.abs(b - a).mean() for a, b in _neighbours(video, 2)])
    else:
        one_frames = [np.abs(np.diff(frame.astype(np.float64), axis=axis - 1)) for frame in video]
        steps = np.mean([each.mean(axis=(2 - axis, 2)) for each in one_frames], axis=0)
    across = [border - 1 for border in borders]
    beside = [place + side for place in across for side in (-2, -1, 1, 2) if 0 <= place + side < len(steps)]
    beside = [place for place in beside if place not in across]
    if not beside or not all(0 <= place < len(steps) for place in across):
        raise InvalidInputError(
            f"borders: got {list(borders)[:10]}, allowed are some from 1 to {len(steps)}, with others between"
        )
    ordinary = steps[beside].mean()
    return float(steps[across].mean() / ordinary) if ordinary else 1.0


def embedding_similarity(first: NDArray, second: NDArray) -> float:
    """Mean cosine similarity of embeddings [N, D] with those of one image [D] or of as many [N, D].

    With CLIP's: image-video similarity (https://arxiv.org/abs/2104.08718), and for neighbouring frames,
    frame consistency.
    """
    a, b = (each / np.linalg.norm(each, axis=-1, keepdims=True) for each in (first, second))
    return float((a * b).sum(axis=-1).mean())


def scores(
    video: Frames,
    image: Frames | None = None,
    embeddings: NDArray | None = None,
    image_embedding: NDArray | None = None,
    borders: Sequence[Sequence[int]] = ((), (), ()),
) -> dict[str, float]:
    """Return all scores of a video that can be had without a reference, by name.

    Args:
        video: the frames.
        image: that the video shall show, [H, W, 3] of any size.
        embeddings: of the frames, [F, D], by CLIP's image tower.
        image_embedding: of the image, [D], by the same.
        borders: of windows (frames), of tiles (rows and columns), as of ``seam_score``.
    """
    found: dict[str, float] = {}
    if image is not None:
        found["thumbnail_similarity"] = thumbnail_similarity(video, image)
    if embeddings is not None and image_embedding is not None:
        found["clip_image_similarity"] = embedding_similarity(embeddings, image_embedding)
    if len(video) > 1:
        if embeddings is not None:
            found["clip_temporal_consistency"] = embedding_similarity(embeddings[1:], embeddings[:-1])
        found["temporal_consistency"] = temporal_consistency(video)
        found["motion"], found["motion_ratio"] = motion(video), motion_ratio(video)
    if len(video) > 2:
        found["flicker"] = flicker(video)
    found["sharpness"] = sharpness(video)
    for axis, name in enumerate(("window_seams", "row_seams", "column_seams")):
        if 0 < len(borders[axis]) < video.shape[axis] - 1:  # else there is nothing to compare with
            found[name] = seam_score(video, borders[axis], axis)
    return found


def reference_scores(video: Frames, reference: Frames) -> dict[str, float]:
    """Return all scores of a video beside what it shall be, of one shape, by name."""
    return {score.__name__: score(video, reference) for score in (psnr, ssim, edge_psnr, block_psnr)}


def _pairs(video: Frames, reference: Frames) -> Iterator[tuple[Floats, Floats]]:
    """Yield the frames of one and the other, float64 [H, W, 3]."""
    if video.shape != reference.shape or video.ndim != 4:
        raise InvalidInputError(
            f"two videos [F, H, W, 3] of one shape are needed, got {list(video.shape)} and "
            f"{list(reference.shape)}; resize or cut one of them"
        )
    return ((a.astype(np.float64), b.astype(np.float64)) for a, b in zip(video, reference))


def _neighbours(video: Frames, count: int) -> Iterator[tuple[Floats, ...]]:
    """Yield each so many frames that follow each other, float64 [H, W, 3]."""
    if video.ndim != 4 or len(video) < count:
        raise InvalidInputError(
            f"a video [F, H, W, 3] of {count} frames or more is needed, got {list(video.shape)}"
        )
    later = (video[first:] for first in range(count))
    return (tuple(each.astype(np.float64) for each in frames) for frames in zip(*later))


def _correlation(a: Floats, b: Floats) -> float:
    """Pearson's correlation; of frames of one colour 1 if they are the same, else 0."""
    x, y = a - a.mean(), b - b.mean()
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm else float(np.array_equal(a, b))


def _decibels(a: Floats, b: Floats) -> float:
    """PSNR; 100 dB at most, so that a mean over frames stays finite."""
    return float(10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 255**2 / 1e10)))


def _luma(frame: Floats) -> Floats:
    """Rec. 601: 0.299 R + 0.587 G + 0.114 B."""
    return frame @ np.array([0.299, 0.587, 0.114])


def _gradient(luma: Floats) -> Floats:
    """Differences to the next pixel across and down."""
    return np.stack([np.diff(luma, axis=1)[:-1], np.diff(luma, axis=0)[:, :-1]])


def _smooth(image: Floats) -> Floats:
    """The Gaussian mean about each pixel whose whole window lies in the image."""
    offsets = np.arange(11) - 5
    kernel = np.exp(-(offsets**2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        size = image.shape[axis] - 10
        if size < 1:
            raise InvalidInputError(f"SSIM needs frames of 11x11 pixels or more, got {list(image.shape)}")
        parts = (image.take(range(start, start + size), axis=axis) for start in range(11))
        image = np.add.reduce([weight * part for weight, part in zip(kernel, parts)])
    return image
