"""``modelscope-i2v enhance``: any video in, the same one sharper out."""

from __future__ import annotations

import argparse
import os
import time

from ..settings.keywords import check_keywords
from ..settings.stages import VIDEO_TO_VIDEO, Setting, call_settings
from .command import PROGRAM, Command, echo
from .flags import FLAG_KINDS, add_flags, add_loading_flags, loading_values, values_of
from .stages import HUB_ID_VIDEO_TO_VIDEO, StageRun


def _add_enhance_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("video", metavar="VIDEO", help="a path or a URL")
    add("-o", "--output", required=True, metavar="PATH", help="the video to write: .mp4, .m4v or .mov")
    add(
        "--model",
        default=HUB_ID_VIDEO_TO_VIDEO,
        metavar="DIR_OR_ID",
        help="stage two's (default: %(default)s)",
    )
    add("--resume", action="store_true", help="go on with what was interrupted, kept beside the output")
    add_loading_flags(parser)
    add_flags(parser, _flags())


def _flags() -> list[Setting]:
    return [each for each in call_settings(VIDEO_TO_VIDEO).values() if each.rule.kind in FLAG_KINDS]


def _enhance(arguments: argparse.Namespace) -> None:
    from ..engine.unfinished import UnfinishedWork
    from ..engine.video_to_video import VideoToVideo
    from ..media.video import check_writable

    start = time.monotonic()
    check_writable(arguments.output)
    keywords = check_keywords(VIDEO_TO_VIDEO, values_of(arguments, _flags()))
    settings = loading_values(arguments)
    run = StageRun(VIDEO_TO_VIDEO, os.path.expanduser(arguments.model), settings, keywords)
    run.check()
    stage = run.downloaded().load()
    assert isinstance(stage, VideoToVideo)
    try:
        done = stage.enhance(arguments.video, arguments.output, arguments.resume, **keywords)
    except BaseException:
        if (folder := UnfinishedWork(arguments.output).folder).exists():
            echo(f"{PROGRAM}: what is done is kept in {folder}; --resume goes on with it")
        raise
    width, height = done.size
    echo(
        f"{done.path}: {done.frames} frames of {width}x{height} at {done.fps:g} fps, {done.scenes} "
        f"scene{'s' * (done.scenes > 1)}, seed {done.record['seed']} ({time.monotonic() - start:.0f} s)"
    )


ENHANCE = Command(
    "enhance",
    "make a video larger and sharper, with its sound and its rate, whatever its length",
    _add_enhance_arguments,
    _enhance,
)
