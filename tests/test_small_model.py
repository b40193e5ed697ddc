"""The small model that ships: what it can do on scenes that it was not trained on. Random weights cannot."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import modelscope_i2v
from modelscope_i2v import TwoStages, VideoToVideo, metrics
from modelscope_i2v.media.video import Video
from modelscope_i2v.samplers.windows import window_starts
from modelscope_i2v.training.scenes import TRAINING_SEEDS, Scene, draw
from modelscope_i2v.training.small_model import PHASES

pytestmark = pytest.mark.slow  # as a whole: left out of the fast loop

FOLDER = Path(modelscope_i2v.__file__).parent / "assets" / "small_model"
SEEDS = range(TRAINING_SEEDS + 500, TRAINING_SEEDS + 508)
SIZE, LARGE_SIZE = (160, 96), (320, 192)


def resized(video, size):
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.BILINEAR)) for frame in video])


def shows_the_object(frame, scene):
    """Whether the middle of the object's place has the object's colour, more than any colour else.

    The window of a fifth of the height is moved by up to a tenth: the object may be so far from its place.
    """
    height, width, _ = frame.shape
    x, y = scene.position(0.0)
    centre_x, centre_y = x * height + width / 2, (y + 0.5) * height
    if scene.kind == "boat":  # whose body is below its middle
        centre_y += 0.35 * scene.size * height
    half, reach = height // 20, height // 10
    nearest = np.inf
    for dy in range(-reach, reach + 1, 2):
        for dx in range(-reach, reach + 1, 2):
            top, left = int(centre_y + dy - half), int(centre_x + dx - half)
            window = frame[max(top, 0) : top + 2 * half, max(left, 0) : left + 2 * half]
            if window.size:
                nearest = min(nearest, np.abs(window.mean((0, 1)) - scene.object_colour).max())
    return nearest < 48


class Scores:
    """What a model folder makes of eight unseen scenes."""

    def __init__(self, folder):
        stages = TwoStages.load(folder, device="cpu")
        self.scenes = [Scene.from_seed(seed) for seed in SEEDS]
        self.true = [draw(seed, size=SIZE)[0] for seed in SEEDS]
        self.large = [draw(seed, size=LARGE_SIZE)[0] for seed in SEEDS]
        self.videos = [stages.first(Image.fromarray(video[0]), seed=1).frames for video in self.true]
        self.other_seed = stages.first(Image.fromarray(self.true[0][0]), seed=2).frames
        self.refined = [stages.second(Video(video, fps=8), seed=1).frames for video in self.true[:3]]
        self.autoencoder = stages.first.autoencoder

    def reconstruction(self):
        """dB of frames through the autoencoder."""
        frames = np.stack([video[4] for video in self.true])
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

    def objects(self):
        return sum(shows_the_object(video[0], scene) for video, scene in zip(self.videos, self.scenes))

    def motions(self):
        return [metrics.motion_ratio(video) for video in self.videos]

    def gains(self, metric):
        """dB by which stage two is nearer to the true large video than plain enlargement of the small one."""
        pairs = zip(self.true, self.refined, self.large)
        return [
            metric(refined, large) - metric(resized(small, LARGE_SIZE), large)
            for small, refined, large in pairs
        ]


@pytest.fixture(scope="module")
def trained():
    return Scores(FOLDER)


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """The same folder with all weights drawn anew, of the same scale."""
    folder = tmp_path_factory.mktemp("random")
    generator = torch.Generator().manual_seed(0)
    (folder / "configuration.json").write_bytes((FOLDER / "configuration.json").read_bytes())
    for path in FOLDER.glob("*.safetensors"):
        drawn = {}
        for name, value in load_file(path).items():
            scale = value.float().square().mean().sqrt()
            drawn[name] = (scale * torch.randn(value.shape, generator=generator)).half()
        save_file(drawn, folder / path.name)
    return Scores(folder)


def test_the_folder_is_small_and_says_where_it_comes_from():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16_000_000
    for path in FOLDER.glob("*.safetensors"):
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    record = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert record["seeds"] == [0, TRAINING_SEEDS - 1]
    assert {"phases", "cpu_minutes", "code"} <= record.keys()


def test_the_autoencoder_keeps_scenes(trained, random):
    assert trained.reconstruction() >= 34
    assert random.reconstruction() < 25


def test_the_first_frame_is_like_its_picture(trained, random):
    assert trained.nearest() == 8
    assert trained.likeness().diagonal().min() >= 19
    assert random.nearest() <= 4 and random.likeness().diagonal().max() < 19


def test_the_object_is_there(trained, random):
    assert all(shows_the_object(video[0], scene) for video, scene in zip(trained.true, trained.scenes))
    without = [replace(scene, size=1e-3).frame(0.0, SIZE) for scene in trained.scenes]
    assert not any(shows_the_object(frame, scene) for frame, scene in zip(without, trained.scenes))
    assert trained.objects() >= 6
    assert random.objects() < 6


def test_it_moves_and_does_not_flicker(trained, random):
    # Wished for: 2.2 in all eight. Where the scene itself moves little, what is left of flicker counts.
    assert sum(ratio >= 2.2 for ratio in trained.motions()) >= 6 and min(trained.motions()) >= 1.7
    assert min(metrics.motion(video) for video in trained.videos) >= 1
    assert np.median(random.motions()) < 2.2


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.edge_psnr])
def test_stage_two_is_nearer_to_the_truth_than_enlarging(trained, random, metric):
    assert min(trained.gains(metric)) > 0.5
    assert max(random.gains(metric)) < 0


def test_another_picture_or_seed_gives_another_video(trained):
    for a, b in zip(trained.videos, trained.videos[1:]):
        assert metrics.psnr(a, b) < 25
    assert not np.array_equal(trained.other_seed, trained.videos[0])


@pytest.mark.slow
def test_its_recipe_makes_such_a_folder(tmp_path, monkeypatch):
    """Every phase for two steps, on next to no scenes: what comes out is a model for both stages."""
    for name, attributes in {
        "tower": {"count": 8, "tests": 2},
        "image-to-video": {"count": 4},  # and so the phase that goes on with it
        "video-to-video": {"count": 2},
    }.items():
        for attribute, value in attributes.items():
            monkeypatch.setattr(PHASES[name], attribute, value)
    script = Path(__file__).parents[1] / "scripts" / "train_small_model.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--run", str(tmp_path), "--steps", "2"])
    runpy.run_path(str(script), run_name="__main__")
    folder = tmp_path / "model"
    assert {path.name for path in FOLDER.iterdir()} == {path.name for path in folder.iterdir()}
    assert (folder / "configuration.json").read_bytes() == (FOLDER / "configuration.json").read_bytes()
    for path in FOLDER.glob("*.safetensors"):
        shapes, made = ({name: value.shape for name, value in load_file(each / path.name).items()}
                        for each in (FOLDER, folder))  # fmt: skip
        assert shapes == made
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert set(record["phases"]) == set(PHASES)


def borders(count, size, overlap):
    """Where parts of ``size`` that share ``overlap`` begin and end within ``count``."""
    starts = window_starts(count, size, overlap)
    return sorted({place for start in starts for place in (start, start + size) if 0 < place < count})


def test_windows_and_tiles_leave_no_seams():
    second = VideoToVideo.load(FOLDER, "cpu")
    video = Video(draw(SEEDS[3], frames=16, size=SIZE)[0], fps=8)
    whole, windows, tiles = (
        second(video, seed=1, max_frames=16, **parts).frames
        for parts in ({}, {"chunk_size": 8, "overlap_size": 4}, {"tile_size": 160, "tile_overlap": 40})
    )
    assert not np.array_equal(windows, whole) and not np.array_equal(tiles, whole)
    assert metrics.seam_score(windows, borders(16, 8, 4), axis=0) <= 1.05
    for axis, pixels in ((1, LARGE_SIZE[1]), (2, LARGE_SIZE[0])):
        places = borders(pixels, 160, 40)
        steps, of_the_scene = (metrics.seam_score(each, places, axis) for each in (tiles, whole))
        assert steps <= of_the_scene + 0.05
