"""The small model that ships: what it can do on scenes that it was not trained on, measured.

Each bound stands beside the one that is wished for, where the model does not reach it; random weights fail
them. Wished for and not there yet: the object in its place (6 of 8; it has 0), steady motion (last to first
2.2 times next to this; it has 1.2 to 1.4), and a second stage.
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
from modelscope_i2v.training.scenes import TRAINING_SEEDS, draw

FOLDER = Path(modelscope_i2v.__file__).parent / "assets" / "small_model"
SEEDS = range(TRAINING_SEEDS + 500, TRAINING_SEEDS + 508)
SIZE, LARGE_SIZE = (80, 48), (160, 96)


class Generated:
    """Eight unseen scenes, and what a model folder makes of them."""

    def __init__(self, folder):
        first = ImageToVideo.load(folder, "cpu")
        self.true = [draw(seed, size=SIZE)[0] for seed in SEEDS]
        self.large = [draw(seed, size=LARGE_SIZE)[0] for seed in SEEDS]
        self.videos = [first(Image.fromarray(large[0]), seed=1).frames for large in self.large]
        self.other_seed = first(Image.fromarray(self.large[0][0]), seed=2).frames
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
            name: (
                value.float().square().mean().sqrt() * torch.randn(value.shape, generator=generator)
            ).half()
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
    assert own.min() >= 19
    assert trained.nearest() >= 6  # wished for: 8
    assert random.likeness().diagonal().mean() < 12 and random.nearest() <= 2


def test_another_picture_or_seed_gives_another_video(trained):
    for a, b in zip(trained.videos, trained.videos[1:]):
        assert metrics.psnr(a, b) < 40
    assert not np.array_equal(trained.other_seed, trained.videos[0])
