"""The pictures that are drawn of latents while a video is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sample_videos import moving_frames

import modelscope_i2v
from modelscope_i2v.engine.image_to_video import ImageToVideo
from modelscope_i2v.engine.latent_colours import LatentColours
from modelscope_i2v.engine.progress import Progress
from modelscope_i2v.engine.video_to_video import VideoToVideo
from modelscope_i2v.media.images import open_image
from modelscope_i2v.media.preprocessing import VideoTransform
from modelscope_i2v.media.video import read_video, video_bytes
from modelscope_i2v.models.autoencoder import SCALE_FACTOR, DiagonalGaussian

FOLDER = Path(modelscope_i2v.__file__).parent / "assets" / "small_model"


class ColoursThemselves:
    """An autoencoder whose latents are the mean colours of 8x8 pixels, mixed by a matrix."""

    def __init__(self, mixing: torch.Tensor):
        self.mixing = mixing
        self.config = type("Config", (), {"downscale": 8})
        self.quant_conv = torch.nn.Conv2d(1, 1, 1)

    def encode(self, images: torch.Tensor) -> DiagonalGaussian:
        mean = torch.einsum("zc,nchw->nzhw", self.mixing, F.avg_pool2d(images, 8))
        return DiagonalGaussian(mean, mean)


def test_a_linear_autoencoder_is_drawn_exactly():
    mixing = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    colours = LatentColours.fit(ColoursThemselves(mixing))
    wanted = torch.rand(3, 6, 9, generator=torch.Generator().manual_seed(4)) * 2 - 1
    latents = SCALE_FACTOR * torch.einsum("zc,chw->zhw", mixing, wanted)
    drawn = colours.draw(latents)
    assert drawn.shape == (6, 9, 3) and drawn.dtype == torch.uint8
    assert (drawn.float() / 127.5 - 1 - wanted.permute(1, 2, 0)).abs().max() < 0.01


@pytest.fixture(scope="module")
def stage() -> ImageToVideo:
    return ImageToVideo.load(FOLDER, "cpu")


def test_pictures_are_recognised_in_the_trained_models_latents(stage, picture):
    image = VideoTransform()([open_image(str(picture)).resize((160, 96))])
    latents = SCALE_FACTOR * stage.autoencoder.encode(image).mean[0]
    drawn = stage.fit_latent_colours().draw(latents).float() / 127.5 - 1
    pooled = F.avg_pool2d(image, stage.autoencoder.config.downscale)[0].permute(1, 2, 0)
    unexplained = (drawn - pooled).square().mean() / (pooled - pooled.mean((0, 1))).square().mean()
    assert unexplained < 0.35


def test_a_progress_of_the_callers_sees_the_denoised_estimate(stage, picture):
    seen, progress = [], Progress(lambda step, timestep, x: seen.append((x, progress.estimate)))
    video = stage(str(picture), seed=1, solver="ddim", steps=4, progress=progress)
    assert len(seen) == video.record["steps"] and video.seconds == progress.seconds
    distances = [(state - estimate).norm() / estimate.norm() for state, estimate in (seen[0], seen[-1])]
    assert distances[1] < 0.2 < distances[0]  # the noise that is in the state, not in the estimate


def test_an_enhancement_tells_the_callers_progress_too(small_model, tmp_path):
    seen, progress = [], Progress(lambda step, timestep, x: seen.append(progress.estimate.shape))
    output = tmp_path / "out.mp4"
    stage = VideoToVideo.load(small_model[1], "cpu")
    stage.enhance(video_bytes(moving_frames(4, 40, 64)), output, progress=progress)
    assert seen == [(1, 4, 4, 10, 16)] * 2 and len(read_video(output).frames) == 4
