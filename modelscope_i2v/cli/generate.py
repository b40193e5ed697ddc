"""``modelscope-i2v generate``: the real job."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..errors import InvalidInputError
from .command import Command, add_run_arguments, given, say, size_argument
from .stages import HUB_ID_IMAGE_TO_VIDEO, HUB_ID_VIDEO_TO_VIDEO, Stage, download, quiet, release_memory


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", metavar="IMAGE", help="a path or a URL")
    add("-o", "--output", required=True, metavar="PATH", help="the video to write: .mp4, .m4v or .mov")
    add("--model", default=HUB_ID_IMAGE_TO_VIDEO, metavar="DIR_OR_ID",
        help="stage one's folder, or its id on the hub (default: %(default)s)")  # fmt: skip
    add("--steps", type=int, metavar="N", help="of denoising")
    add("--guide-scale", type=float, metavar="X", help="how closely to follow the image")
    add("--frames", type=int, metavar="N", help="the video's length")
    add("--size", type=size_argument, metavar="WxH", help="of the video, in pixels")
    add("--fps", type=int, metavar="N", help="frames per second")
    add("--precision", metavar="P", help="auto, fp32, fp16 or bf16")
    add("--low-memory", action="store_true", default=None, help="use the GPU's memory sparingly")
    add("--compile", action="store_true", default=None, help="compile the networks' blocks first")
    add("--solver", metavar="S", help="ddim, or dpmpp: approximate, in half as many steps")
    add("--reuse-interval", type=int, metavar="N",
        help="approximate: compute deep features at every Nth step only")  # fmt: skip
    add("--like", metavar="VIDEO", help="with the seed and all else that a video of ours was made with")
    add_run_arguments(parser)
    refine = parser.add_argument_group("stage two: a larger, sharper video")
    refine.add_argument("--refine", nargs="?", const="", metavar="DIR_OR_ID",
        help="run it too, of this folder or id on the hub (default: stage one's folder if it describes both "
        f"stages, else {HUB_ID_VIDEO_TO_VIDEO})")  # fmt: skip
    refine.add_argument("--text", metavar="T", help="what the video shows, in English")
    refine.add_argument("--refine-steps", type=int, metavar="N", help="of denoising in stage two")
    refine.add_argument(
        "--refine-size", type=size_argument, metavar="WxH", help="of the final video, in pixels"
    )
    refine.add_argument("--keep-first", metavar="PATH", help="write stage one's video there")


def _generate(arguments: argparse.Namespace) -> None:
    from ..media.images import open_image
    from ..media.video import check_writable, write_video

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
    stages = [_downloaded(stage, arguments.debug) for stage in stages]
    if len(stages) == 1:
        stages[0].run(image, arguments.output, arguments.debug)
        return
    with quiet(arguments.debug):
        video = stages[0].build(arguments.debug).generate(image, **stages[0].keywords)
    if arguments.keep_first is not None:
        say(write_video(video.frames, arguments.keep_first, video.fps, video.metadata))
    release_memory()
    stages[1].run({"video_path": video}, arguments.output, arguments.debug)


def _keywords_like(path: str | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The keywords that made a video, of each stage."""
    if path is None:
        return {}, None
    from ..media.sources import source_name
    from ..media.video import read_metadata
    from ..settings.record import keywords_like

    return keywords_like(read_metadata(path), source_name(path))


def _check_refine_arguments(arguments: argparse.Namespace) -> None:
    options = given(
        text=arguments.text,
        refine_steps=arguments.refine_steps,
        refine_size=arguments.refine_size,
        keep_first=arguments.keep_first,
    )
    if arguments.refine is None and options:
        names = ", ".join("--" + name.replace("_", "-") for name in options)
        raise InvalidInputError(f"without --refine there is no stage two for {names}")
    if arguments.keep_first and os.path.realpath(arguments.keep_first) == os.path.realpath(arguments.output):
        raise InvalidInputError(f"--keep-first and --output are the same file, {arguments.output!r}")


def _stages(
    arguments: argparse.Namespace, first_like: dict[str, Any], second_like: dict[str, Any]
) -> list[Stage]:
    """The stages that the arguments ask for, which go before what another video was made with."""
    settings = given(
        device=arguments.device,
        precision=arguments.precision,
        low_memory=arguments.low_memory,
        compile=arguments.compile,
    )
    both = given(
        seed=arguments.seed,
        fps=arguments.fps,
        progress=arguments.progress or None,
        reuse_interval=arguments.reuse_interval,
    )
    first = given(
        steps=arguments.steps,
        solver=arguments.solver,
        guide_scale=arguments.guide_scale,
        max_frames=arguments.frames,
        resolution=arguments.size,
    )
    model = os.path.expanduser(arguments.model)
    stages = [Stage("image-to-video", model, settings, {**first_like, **both, **first})]
    if arguments.refine is not None:
        second = given(text=arguments.text, steps=arguments.refine_steps, resolution=arguments.refine_size)
        refine = os.path.expanduser(arguments.refine) or _default_refine_model(model)
        stages.append(Stage("video-to-video", refine, settings, {**second_like, **both, **second}))
    return stages


def _default_refine_model(model: str) -> str:
    from ..settings.configuration import read_configuration, stages_in

    if os.path.isdir(model) and "video-to-video" in stages_in(read_configuration(model)):
        return model
    return HUB_ID_VIDEO_TO_VIDEO


def _downloaded(stage: Stage, debug: bool) -> Stage:
    """The stage with its model in a folder, which was checked."""
    if os.path.exists(stage.model):
        return stage
    stage = Stage(stage.task, download(stage.model, debug), stage.settings, stage.keywords)
    stage.check()
    return stage


GENERATE = Command(
    "generate",
    "make a video of an image, and with --refine a larger, sharper one of that",
    _add_generate_arguments,
    _generate,
)
