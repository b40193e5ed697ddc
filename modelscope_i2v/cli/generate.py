"""``modelscope-i2v generate``: the real job."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..errors import InvalidInputError
from ..settings.keywords import REFINE_PREFIX, check_keywords, split_keywords
from .command import Command, echo, without_none
from .flags import (
    add_flags,
    add_loading_flags,
    first_stage_flags,
    loading_values,
    second_stage_flags,
    values_of,
)
from .stages import HUB_ID_IMAGE_TO_VIDEO, HUB_ID_VIDEO_TO_VIDEO, StageRun, release_memory


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", metavar="IMAGE", help="a path or a URL")
    add("-o", "--output", required=True, metavar="PATH", help="the video to write: .mp4, .m4v or .mov")
    add("--model", default=HUB_ID_IMAGE_TO_VIDEO, metavar="DIR_OR_ID",
        help="stage one's folder, or its id on the hub (default: %(default)s)")  # fmt: skip
    add("--like", metavar="VIDEO", help="with the seed and all else that a video of ours was made with")
    add_loading_flags(parser)
    add_flags(parser, first_stage_flags())
    refine = parser.add_argument_group("stage two: a larger, sharper video")
    refine.add_argument("--refine", nargs="?", const="", metavar="DIR_OR_ID",
        help="run it too, of this folder or id on the hub (default: stage one's folder if it describes both "
        f"stages, else {HUB_ID_VIDEO_TO_VIDEO})")  # fmt: skip
    only_second, own_of_second = second_stage_flags()
    add_flags(refine, only_second)
    add_flags(refine, own_of_second, REFINE_PREFIX)
    refine.add_argument("--keep-first", metavar="PATH", help="write stage one's video there")


def _generate(arguments: argparse.Namespace) -> None:
    from ..media.images import open_image
    from ..media.video import check_writable

    check_writable(arguments.output)
    if arguments.keep_first is not None:
        check_writable(arguments.keep_first)
    first_like, second_like = _keywords_like(arguments.like)
    if second_like is not None and arguments.refine is None:
        arguments.refine = ""
    _check_refine_arguments(arguments)
    image = open_image(arguments.image)
    stages = _stages(arguments, first_like, second_like or {})
    for stage in stages:
        stage.check()
    # Both models before the first is run: downloads fail more often than anything else.
    stages = [stage.downloaded() for stage in stages]
    if len(stages) == 1:
        stages[0].run(image, arguments.output)
        return
    video = stages[0].load()(image, **stages[0].keywords)
    if arguments.keep_first is not None:
        echo(video.save(arguments.keep_first))
    release_memory()
    stages[1].run(video, arguments.output)


def _keywords_like(path: str | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The keywords that made a video, of each stage."""
    if path is None:
        return {}, None
    from ..media.sources import source_name
    from ..media.video import read_metadata
    from ..settings.record import keywords_like

    return keywords_like(read_metadata(path), source_name(path))


def _check_refine_arguments(arguments: argparse.Namespace) -> None:
    if arguments.refine is None:
        only, own = second_stage_flags()
        flags = [each.flag for each in only if values_of(arguments, [each])]
        flags += [f"refine-{each.flag}" for each in own if values_of(arguments, [each], REFINE_PREFIX)]
        flags += ["keep-first"] if arguments.keep_first is not None else []
        if flags:
            names = ", ".join(f"--{flag}" for flag in flags)
            raise InvalidInputError(f"without --refine there is no stage two for {names}")
    if arguments.keep_first and os.path.realpath(arguments.keep_first) == os.path.realpath(arguments.output):
        raise InvalidInputError(f"--keep-first and --output are the same file, {arguments.output!r}")


def _stages(
    arguments: argparse.Namespace, first_like: dict[str, Any], second_like: dict[str, Any]
) -> list[StageRun]:
    """Return the stages to run; what the arguments say goes before what another video was made with."""
    settings = loading_values(arguments)
    model = os.path.expanduser(arguments.model)
    keywords = values_of(arguments, first_stage_flags())
    if arguments.refine is None:
        return [
            StageRun(
                "image-to-video",
                model,
                settings,
                {**first_like, **check_keywords("image-to-video", keywords)},
            )
        ]
    only, own = second_stage_flags()
    both = without_none(refine_reuse_interval=arguments.reuse_interval)  # unless stage two has its own
    second = {**values_of(arguments, only), **both, **values_of(arguments, own, REFINE_PREFIX)}
    first, second = split_keywords({**keywords, **second})
    refine = os.path.expanduser(arguments.refine) or _default_refine_model(model)
    return [
        StageRun("image-to-video", model, settings, {**first_like, **first}),
        StageRun("video-to-video", refine, settings, {**second_like, **second}),
    ]


def _default_refine_model(model: str) -> str:
    from ..settings.configuration import read_configuration, stages_in

    if os.path.isdir(model) and "video-to-video" in stages_in(read_configuration(model)):
        return model
    return HUB_ID_VIDEO_TO_VIDEO


GENERATE = Command(
    "generate",
    "make a video of an image, and with --refine a larger, sharper one of that",
    _add_generate_arguments,
    _generate,
)
