"""Preprocessing: the published image tensor, no black borders, and frames in and out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import load_fixture, load_json
from PIL import Image

from modelscope_i2v.errors import InvalidInputError
from modelscope_i2v.media.images import MAX_PIXELS
from modelscope_i2v.media.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    ClipImageTransform,
    VideoTransform,
    center_crop,
    to_frames,
    to_tensor,
)

SIZES = [tuple(size) for size in load_json("meta")["preprocess_sizes"]]
#: Sizes at which the quotient of two sides rounds down, and others from tiny to long.
SWEEP = [
    (1280, 720), (640, 360), (1920, 1080), (720, 1280), (854, 480), (1000, 750), (447, 447), (449, 448),
    (1, 1), (2, 3), (13, 7), (100, 30), (300, 1200), (2000, 150), (448, 449), (896, 448), (3000, 2000),
    *[(width, 3 * width // 2 - 1) for width in range(101, 1400, 87)],
    *[(4 * height // 3 + 1, height) for height in range(89, 1300, 93)],
]  # fmt: skip


def test_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """The fixtures' test image, by its formula."""
    y, x = np.mgrid[:height, :width]
    red = 127.5 * (1 + np.sin(x / 17 + seed))
    green = 127.5 * (1 + np.cos(y / 11 - seed))
    blue = (3 * x + 5 * y + 7 * seed) % 256
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


test_image.__test__ = False


@pytest.mark.parametrize("width, height", SIZES)
def test_image_tensor_is_the_published_one(width, height):
    tensor = ClipImageTransform(224)(test_image(width, height, load_json("meta")["seed"]))
    assert tensor.shape == (3, 224, 224)
    assert tensor.dtype == torch.float32
    published = load_fixture("preprocess")[f"{width}x{height}"]
    np.testing.assert_allclose(tensor[:, ::8, ::8].numpy(), published, atol=1e-6)


@pytest.mark.parametrize("width, height", SWEEP)
def test_no_size_gets_a_black_border(width, height):
    colour = (255, 128, 3)
    image = Image.new("RGB", (width, height), colour)
    cropped = center_crop(image)
    assert cropped.size == (448, 448)
    assert cropped.getextrema() == tuple((value, value) for value in colour)
    assert image.size == (width, height)


def test_constant_image_is_its_normalised_colour():
    tensor = ClipImageTransform(32)(Image.new("RGB", (1280, 720), (255, 128, 0)))
    assert tensor.shape == (3, 32, 32)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert (CLIP_MEAN, CLIP_STD) == (mean, std)
    for channel, value in enumerate((1.0, 128 / 255, 0.0)):
        expected = torch.full((32, 32), (value - mean[channel]) / std[channel])
        torch.testing.assert_close(tensor[channel], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [448, 64])
def test_square_of_the_crops_size_is_kept_as_it_is(side):
    image = test_image(side, side)
    assert np.array_equal(center_crop(image, side), image)


def test_crop_is_central():
    pixels = np.asarray(test_image(801, 448))
    assert np.array_equal(center_crop(Image.fromarray(pixels)), pixels[:, 176:624])
    tall = pixels.transpose(1, 0, 2)
    assert np.array_equal(center_crop(Image.fromarray(tall)), tall[176:624])


@pytest.mark.parametrize("width, height, times", [(896, 896, 2), (192, 128, 2), (192, 330, 3)])
def test_whole_multiples_are_averaged_by_the_box_filter(width, height, times):
    side = min(width, height) // times
    pixels = np.asarray(test_image(width, height))
    rows, columns = height // times, width // times
    means = pixels.reshape(rows, times, columns, times, 3).mean((1, 3))
    top, left = (rows - side) // 2, (columns - side) // 2
    expected = means[top : top + side, left : left + side]
    cropped = np.asarray(center_crop(Image.fromarray(pixels), side)).astype(float)
    assert np.abs(cropped - expected).max() <= 1  # the filter rounds after each of its two passes


@pytest.mark.parametrize("size", [(1280, 720), (640, 360), (300, 500), (1000, 333), (5, 3)])
def test_shorter_side_is_scaled_to_the_crops(monkeypatch, size):
    seen, resize = [], Image.Image.resize

    def recorded(image, size, **options):
        seen.append((size, options))
        return resize(image, size, **options)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    center_crop(Image.new("RGB", size))
    scale = min(size) / 448
    [(resized, options)] = seen
    assert resized == tuple(max(math.floor(length / scale), 448) for length in size)
    assert min(resized) == 448
    assert options == {"resample": Image.Resampling.BOX}


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_long_narrow_images_need_no_more_memory_than_the_largest_image(monkeypatch, size):
    """Scaled whole, a line of 20,000 pixels would be 448 x 8,960,000 of them: 12 GB."""
    seen, resize = [], Image.Image.resize

    def recorded(image, size, *arguments, **options):
        seen.append(size)
        if size[0] * size[1] > MAX_PIXELS:
            pytest.fail(f"resized to {size[0]}x{size[1]}")
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    try:
        assert center_crop(Image.new("RGB", size, (9, 8, 7))).getextrema() == ((9, 9), (8, 8), (7, 7))
    except InvalidInputError:
        assert seen == []  # refused instead


def test_to_tensor_copies_its_pixels():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 1] = (51, 102, 255)
    tensor = to_tensor(pixels)
    pixels[:] = 7
    assert tensor.shape == (3, 2, 3)
    assert tensor[:, 0, 1].tolist() == pytest.approx([0.2, 0.4, 1.0])
    assert tensor.sum().item() == pytest.approx(1.6)


# Videos


@pytest.mark.parametrize("given", [np.asarray, lambda frames: [Image.fromarray(frame) for frame in frames]])
def test_video_transform_keeps_order_and_range(given):
    frames = np.zeros((3, 4, 6, 3), np.uint8)
    frames[1, 2, 5] = (0, 127, 255)
    frames[2] = 255
    video = VideoTransform()(given(frames))
    assert video.shape == (3, 3, 4, 6)
    assert video.dtype == torch.float32
    assert (video[0] == -1).all()
    assert (video[2] == 1).all()
    assert video[1, :, 2, 5].tolist() == pytest.approx([-1, 127 / 127.5 - 1, 1])
    assert (video[1] == -1).sum() == 3 * 4 * 6 - 2


def test_to_frames_truncates_and_clamps():
    values = {-3.0: 0, -1.0: 0, -0.9922: 0, -0.992: 1, 0.0: 127, 0.4: 178, 0.9999: 254, 1.0: 255, 7.5: 255}
    video = torch.tensor(list(values)).view(1, 1, 1, -1).expand(3, 2, 5, -1)
    frames = to_frames(video)
    assert frames.dtype == np.uint8
    assert frames.shape == (2, 5, len(values), 3)
    assert (frames == np.array(list(values.values()))[:, None]).all()


def test_to_frames_keeps_order():
    video = torch.arange(3 * 2 * 4 * 5).view(3, 2, 4, 5) / 60 - 1
    frames = to_frames(video)
    expected = np.floor((video.numpy() / 2 + 0.5) * np.float32(255)).astype(np.uint8).transpose(1, 2, 3, 0)
    assert np.array_equal(frames, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_to_frames_computes_in_float32(dtype):
    video = (torch.arange(512.0).view(1, 2, 16, 16).expand(3, -1, -1, -1) / 256 - 1).to(dtype)
    assert np.array_equal(to_frames(video), to_frames(video.float()))


def test_to_frames_leaves_the_video_as_it_is():
    video = torch.full((3, 1, 2, 2), 5.0)
    to_frames(video)
    assert (video == 5).all()


def test_frames_come_back_from_the_network_range():
    """Truncation takes at most one from a value: 8-bit frames are otherwise kept."""
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    difference = frames.astype(int) - to_frames(VideoTransform()(frames).transpose(0, 1))
    assert set(np.unique(difference)) <= {0, 1}
