"""The small model that ships: what it can do on scenes that it was not trained on, measured.

Each bound stands beside the one that is wished for, where the model does not reach it. Random weights fail
every one of them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import modelscope_i2v
from modelscope_i2v import metrics
from modelscope_i2v.engine.image_to_video import ImageToVideo
from modelscope_i2v.engine.video_to_video import VideoToVideo
from modelscope_i2v.media.video import Video
from modelscope_i2v.training.scenes import TRAINING_SEEDS, Scene, draw

FOLDER = Path(modelscope_i2v.__file__).parent / "assets" / "small_model"
SEEDS = range(TRAINING_SEEDS + 500, TRAINING_SEEDS + 508)
SIZE, LARGE_SIZE = (80, 48), (160, 96)


class Generated:
    """Eight unseen scenes, and what a model folder makes of them."""

    def __init__(self, folder):
        first, second = ImageToVideo.load(folder, "cpu"), VideoToVideo.load(folder, "cpu")
        self.scenes = [Scene.from_seed(seed) for seed in SEEDS]
        self.true = [draw(seed, size=SIZE)[0] for seed in SEEDS]
        self.large = [draw(seed, size=LARGE_SIZE)[0] for seed in SEEDS]
        self.videos = [first(Image.fromarray(large[0]), seed=1).frames for large in self.large]
        self.other_seed = first(Image.fromarray(self.large[0][0]), seed=2).frames
        self.sharpened = [
            second(Video(true, 8), text=scene.caption, seed=1).frames
            for true, scene in zip(self.true[:3], self.scenes)
        ]
        self.autoencoder = first.autoencoder

    def reconstruction(self):
        """dB of frames through the autoencoder."""
        frames = np.stack([video[4] for video in self.large])
        images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            decoded = self.autoencoder.decode(self.autoencoder.encode(images).mode())
        decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
        return metrics.psnr(decoded, frames)

    def likeness(self):
        """[8, 8]: dB of block means of each video's first frame against each picture."""
        return np.array([[metrics.block_psnr(a[:1], b[:1]) for b in self.true] for a in self.videos])

    def nearest(self):
        return int((self.likeness().argmax(1) == np.arange(8)).sum())

    def ratios(self):
        return [metrics.motion_ratio(video) for video in self.videos]

    def objects(self):
        """In how many first frames the object's place is nearer to its colour than most others are."""
        found = 0
        for video, scene in zip(self.videos, self.scenes):
            distance = np.abs(video[0].astype(float) - scene.object_colour).sum(-1)
            height, width = distance.shape
            row, column = (scene.y + 0.5) * height, scene.x * height + width / 2
            rows, columns = np.mgrid[:height, :width]
            near = np.hypot(rows - row, columns - column) < 0.12 * height
            found += distance[near].mean() < np.quantile(distance, 0.1)
        return found

    def gains(self, score):
        """By how much stage two's videos beat plain upscaling of the same small ones, in dB."""
        gains = []
        for small, large, sharp in zip(self.true, self.large, self.sharpened):
            enlarged = np.stack(
                [Image.fromarray(frame).resize(LARGE_SIZE, Image.Resampling.BILINEAR) for frame in small]
            )
            gains.append(score(sharp, large) - score(enlarged, large))
        return gains


@pytest.fixture(scope="module")
def trained():
    return Generated(FOLDER)


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """The same folder with all weights drawn anew, of the same scale."""
    folder = tmp_path_factory.mktemp("random")
    generator = torch.Generator().manual_seed(0)
    (folder / "configuration.json").write_bytes((FOLDER / "configuration.json").read_bytes())
    for path in FOLDER.glob("*.safetensors"):
        drawn = {
            name: (value.float().square().mean().sqrt() * torch.randn(value.shape, generator=generator)).half()
            for name, value in load_file(path).items()
        }
        save_file(drawn, folder / path.name)
    return Generated(folder)


def test_the_folder_is_small_and_says_where_it_comes_from():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16_000_000
    for path in FOLDER.glob("*.safetensors"):
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    record = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert record["seeds"] == [0, TRAINING_SEEDS - 1]
    assert {"phases", "cpu_minutes", "code"} <= record.keys()


def test_the_autoencoder_keeps_scenes(trained, random):
    assert trained.reconstruction() >= 28
    assert random.reconstruction() < 25


def test_the_first_frame_is_like_its_picture(trained, random):
    own = trained.likeness().diagonal()
    assert own.mean() >= 19 and own.min() >= 15  # wished for: 19 each
    assert trained.nearest() >= 4  # wished for: 8
    assert random.likeness().diagonal().mean() < 12 and random.nearest() <= 2


def test_another_picture_or_seed_gives_another_video(trained):
    for a, b in zip(trained.videos, trained.videos[1:]):
        assert metrics.psnr(a, b) < 40
    assert not np.array_equal(trained.other_seed, trained.videos[0])
