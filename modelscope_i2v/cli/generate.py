"""``modelscope-i2v generate``: a video of an image, and a larger, sharper one of that."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..errors import InvalidInputError
from ..settings.keywords import REFINE_PREFIX, split_keywords
from .command import Command, echo, without_none
from .flags import (
    add_flags,
    add_loading_flags,
    add_second_stage_flags,
    first_stage_flags,
    flag_of,
    loading_values,
    second_stage_flags,
    second_stage_values,
    values_of,
)
from .stages import HUB_ID_IMAGE_TO_VIDEO, HUB_ID_VIDEO_TO_VIDEO, StageRun, default_refine_model


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
    add_second_stage_flags(refine)
    refine.add_argument("--keep-first", metavar="PATH", help="write stage one's video there")


def _generate(arguments: argparse.Namespace) -> None:
    from ..engine.devices import release_memory
    from ..engine.spreading import joined_processes
    from ..media.images import open_image
    from ..media.video import check_writable

    for path in (arguments.output, arguments.keep_first):
        if path is not None:
            check_writable(path)
    runs = _runs(arguments)
    image = open_image(arguments.image)
    for run in runs:
        run.check()
    # Both models before the first is run: downloads fail more often than anything else.
    first, *rest = [run.downloaded() for run in runs]
    with joined_processes() as spread:
        if not rest:
            first.run(image, arguments.output, spread)
            return
        video = first.make(image, spread)
        if arguments.keep_first is not None and spread.is_first:
            echo(video.save(arguments.keep_first))
        release_memory()
        rest[0].run(video, arguments.output, spread)


def _runs(arguments: argparse.Namespace) -> list[StageRun]:
    """Return the stages to run; what the arguments say goes before what another video was made with."""
    first_like, second_like = _keywords_like(arguments.like)
    refine = "" if arguments.refine is None and second_like is not None else arguments.refine
    only, own = second_stage_flags()
    second = second_stage_values(arguments)
    if refine is None:
        flags = [flag_of(each) for each in only if each.keyword in second]
        flags += [flag_of(each, REFINE_PREFIX) for each in own if REFINE_PREFIX + each.keyword in second]
        flags += ["--keep-first"] if arguments.keep_first is not None else []
        if flags:
            raise InvalidInputError(f"without --refine there is no stage two for {', '.join(flags)}")
    elif arguments.keep_first and _are_one_file(arguments.keep_first, arguments.output):
        raise InvalidInputError(f"--keep-first and --output are the same file, {arguments.output!r}")
    both = without_none(refine_reuse_interval=arguments.reuse_interval)  # unless stage two has its own
    first, second = split_keywords({**values_of(arguments, first_stage_flags()), **both, **second})
    settings, model = loading_values(arguments), os.path.expanduser(arguments.model)
    runs = [StageRun("image-to-video", model, settings, {**first_like, **first})]
    if refine is not None:
        second_model = os.path.expanduser(refine) or default_refine_model(model)
        runs.append(StageRun("video-to-video", second_model, settings, {**(second_like or {}), **second}))
    return runs


def _are_one_file(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _keywords_like(path: str | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the keywords that made a video, of each stage."""
    if path is None:
        return {}, None
    from ..media.sources import source_name
    from ..media.video import read_metadata
    from ..settings.record import keywords_like

    return keywords_like(read_metadata(path), source_name(path))


GENERATE = Command(
    "generate",
    "make a video of an image, and with --refine a larger, sharper one of that",
    _add_generate_arguments,
    _generate,
)
