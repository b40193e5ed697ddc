"""``modelscope-i2v preview``: stage one with several seeds, to choose the one to refine."""

from __future__ import annotations

import argparse
import os

from ..settings.stages import Setting
from .command import Command, echo
from .flags import SEED, add_flags, add_loading_flags, first_stage_flags, loading_values, values_of
from .stages import HUB_ID_IMAGE_TO_VIDEO, StageRun


def _add_preview_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", metavar="IMAGE", help="a path or a URL")
    add("-o", "--output", required=True, metavar="FOLDER", help="for the videos and contact_sheet.png")
    add("--seeds", required=True, type=_seeds, metavar="N,N,...", help="one for each video")
    add("--model", default=HUB_ID_IMAGE_TO_VIDEO, metavar="DIR_OR_ID", help="(default: %(default)s)")
    add_loading_flags(parser)
    add_flags(parser, _flags())


def _flags() -> list[Setting]:
    return [each for each in first_stage_flags() if each != SEED]  # which --seeds gives


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are whole numbers, as 1,2,3") from None


def _preview(arguments: argparse.Namespace) -> None:
    from ..engine.image_to_video import ImageToVideo
    from ..engine.previews import generate_previews
    from ..media.images import open_image

    image = open_image(arguments.image)
    keywords, settings = values_of(arguments, _flags()), loading_values(arguments)
    model = os.path.expanduser(arguments.model)
    for seed in arguments.seeds:
        run = StageRun("image-to-video", model, settings, {**keywords, "seed": seed})
        run.check()
    stage = ImageToVideo.load(run.downloaded().model, **settings)
    generate_previews(stage, image, arguments.seeds, arguments.output, **keywords)
    echo(f"{os.path.join(arguments.output, 'contact_sheet.png')}: {len(arguments.seeds)} videos beside it")


PREVIEW = Command(
    "preview",
    "make stage one's videos of several seeds, and a picture of all, to choose the seed to refine",
    _add_preview_arguments,
    _preview,
)
