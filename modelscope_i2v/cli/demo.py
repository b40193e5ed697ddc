"""``modelscope-i2v demo``: the main job on a small model, without a network."""

from __future__ import annotations

import argparse
import os

from .command import PROGRAM, Command, echo, without_none
from .flags import PROGRESS, SEED, add_flags, values_of
from .stages import (
    HUB_ID_IMAGE_TO_VIDEO,
    HUB_ID_VIDEO_TO_VIDEO,
    REVISION,
    StageRun,
    check_device,
    let_waiting_threads_sleep,
)

_ABOUT_THE_WEIGHTS = f"""\
Both stages work. What these videos show is noise, and that is as it should be: the demo's model is small, and
its weights are random numbers. The real weights come from ModelScope's hub:

  modelscope download --model {HUB_ID_IMAGE_TO_VIDEO} --revision {REVISION}
      open_clip_pytorch_model.bin 3.94 GB, v2-1_512-ema-pruned.ckpt 5.21 GB,
      base_03_alldata_fps_v_80g_0789000.pth 5.68 GB
  modelscope download --model {HUB_ID_VIDEO_TO_VIDEO} --revision {REVISION}
      the same two files, and non_ema_0035000.pth 5.65 GB

or by themselves, with the first of these calls or with this command:

  pipeline(task="image-to-video", model="{HUB_ID_IMAGE_TO_VIDEO}", model_revision="{REVISION}")
  pipeline(task="video-to-video", model="{HUB_ID_VIDEO_TO_VIDEO}", model_revision="{REVISION}")

  {PROGRAM} generate IMAGE -o video.mp4 --refine"""


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="a path or a URL (default: a picture of ours)")
    add("-o", "--output", default=".", metavar="FOLDER", help="for the two videos (default: the current one)")
    add("--cache", metavar="DIR", help="where to keep the small model, instead of the user's cache folder")
    parser.add_argument("--device", metavar="D", help="cpu, gpu or cuda:N (default: a GPU if there is one)")
    add_flags(parser, [SEED, PROGRESS])


def _demo(arguments: argparse.Namespace) -> None:
    let_waiting_threads_sleep()
    from ..media.images import open_image
    from ..media.video import check_writable

    first, second = (os.path.join(arguments.output, name) for name in ("i2v_output.mp4", "v2v_output.mp4"))
    for path in (first, second):
        check_writable(path)
    check_device(arguments.device)

    from .demo_model import EXAMPLE_IMAGE, demo_model

    source = arguments.image or str(EXAMPLE_IMAGE)
    image = open_image(source)
    folders = demo_model(
        arguments.cache, lambda folder: echo(f"Making a small model with random weights, once, in {folder}")
    )
    settings = without_none(device=arguments.device)
    keywords = values_of(arguments, [SEED, PROGRESS])
    stages = [
        StageRun(task, str(folder), settings, keywords)
        for task, folder in zip(("image-to-video", "video-to-video"), folders)
    ]
    for stage in stages:
        stage.check()
    echo(f"Stage one, image to video, of {source}")
    video = stages[0].run(image, first)
    echo("Stage two, video to video, of stage one's")
    stages[1].run(video, second)
    echo(f"\n{_ABOUT_THE_WEIGHTS}")


DEMO = Command(
    "demo",
    "run both stages on a small model with random weights, in a minute or two, without a network",
    _add_demo_arguments,
    _demo,
)
