"""``modelscope-i2v demo``: both stages with the small model that ships, without a network."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .command import PROGRAM, Command, echo, without_none
from .flags import PROGRESS, SEED, add_flags, values_of
from .stages import (
    HUB_ID_IMAGE_TO_VIDEO,
    HUB_ID_VIDEO_TO_VIDEO,
    REVISION,
    check_device,
    let_waiting_threads_sleep,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..engine.generated import GeneratedVideo

_ASSETS = Path(__file__).parents[1] / "assets"
MODEL = _ASSETS / "small_model"
EXAMPLE_IMAGE = _ASSETS / "example.png"

_ABOUT_THE_MODEL = f"""\
This model is small, 14 MB, and has seen nothing but drawn scenes: a sky over hills, dunes, snow or the sea,
with a ball, a balloon, a boat or a car. Of such a picture it makes that scene in motion; of any other, such
as a photograph, something vague in its colours. The published model knows the world, and takes 20 GB:

  modelscope download --model {HUB_ID_IMAGE_TO_VIDEO} --revision {REVISION}
  modelscope download --model {HUB_ID_VIDEO_TO_VIDEO} --revision {REVISION}

or the first of these calls, which downloads it:

  pipeline(task="image-to-video", model="{HUB_ID_IMAGE_TO_VIDEO}", model_revision="{REVISION}")
  {PROGRAM} generate IMAGE -o video.mp4 --refine"""


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="a path or a URL (default: a picture of ours)")
    add("-o", "--output", default=".", metavar="FOLDER", help="for the files (default: the current one)")
    add(
        "--print-model",
        action="store_true",
        help="print the model's folder, which either task takes, and end",
    )
    add("--device", metavar="D", help="cpu, gpu or cuda:N (default: a GPU if there is one)")
    add_flags(parser, [SEED, PROGRESS])


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.print_model:
        echo(str(MODEL))
        return
    let_waiting_threads_sleep()
    from ..media.contact_sheet import contact_sheet
    from ..media.files import atomic_file, check_replaceable
    from ..media.images import open_image

    names = ("i2v_output.mp4", "v2v_output.mp4", "demo.png")
    first_path, second_path, sheet_path = (os.path.join(arguments.output, name) for name in names)
    for path in (first_path, second_path, sheet_path):
        check_replaceable(path)
    check_device(arguments.device)
    source = arguments.image or str(EXAMPLE_IMAGE)
    image = open_image(source)

    from ..engine.two_stages import TwoStages

    start = time.monotonic()
    stages = TwoStages.load(MODEL, **without_none(device=arguments.device))
    video = stages.generate(image, **values_of(arguments, [SEED, PROGRESS]))
    first = video.first
    assert first is not None  # stage one's of both
    picture = _cropped(image, first.frames)
    for stage, path, made in (("one", first_path, first), ("two", second_path, video)):
        count, height, width, _ = made.frames.shape
        echo(f"Stage {stage}: {made.save(path)}, {count} frames of {width}x{height}")
        echo(f"    {_scores(made, picture, video.frames.shape[2:0:-1])}")
    rows = [("picture", picture[None]), ("stage one", first.frames), ("stage two", video.frames)]
    with atomic_file(sheet_path) as temporary:
        contact_sheet(rows, width=320).save(temporary, format="PNG")
    echo(f"Both beside the picture: {sheet_path} ({time.monotonic() - start:.0f} s)\n\n{_ABOUT_THE_MODEL}")


def _cropped(image: Image.Image, frames: np.ndarray) -> np.ndarray:
    """Return the middle of an image, [H, W, 3] uint8 of the frames' size."""
    import numpy as np
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(image, frames.shape[2:0:-1], Image.Resampling.BOX))


def _scores(video: GeneratedVideo, picture: np.ndarray, size: tuple[int, int]) -> str:
    """Return how near a video's first frame is to the picture, how it moves, and its sharpness at a size."""
    from .. import metrics

    first_frame = _resized(video.frames[:1], picture.shape[1::-1])
    figures = {
        "likeness to the picture {:.1f} dB": metrics.block_psnr(first_frame, picture[None]),
        "motion ratio {:.1f}": metrics.motion_ratio(video.frames),
        "flicker {:.1f}": metrics.flicker(video.frames),
        "sharpness at {}x{} {{:.0f}}".format(*size): metrics.sharpness(_resized(video.frames, size)),
    }
    return ", ".join(words.format(figure) for words, figure in figures.items())


def _resized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import numpy as np
    from PIL import Image

    method = Image.Resampling.BICUBIC if size[0] > frames.shape[2] else Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, method)) for frame in frames])


DEMO = Command(
    "demo",
    "run both stages with a small trained model, in a minute, without a network",
    _add_demo_arguments,
    _demo,
)
